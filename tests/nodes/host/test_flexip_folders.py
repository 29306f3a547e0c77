"""Folders of pictures to train FlexIP from: what is found, read and refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from host import flexips


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return flexips.folder(tmp_path / "set")


def test_pictures_masks_and_captions_are_found(root: Path, pack: ModuleType) -> None:
    folders = pack.nodes.host.flexip_folders
    (root / "variant" / "readme.txt").write_text("no subject", "utf-8")
    (root / "variant" / "empty").mkdir()
    for hidden in ("variant/.trash/old.png", "variant/a/._0.png"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_bytes(b"")
    found = folders.found(root)
    assert [p.name for p in found.invariant] == ["invariant/0.png", "invariant/1.png"]
    assert [[p.name for p in group] for group in found.subjects] == [
        ["variant/a/0.png", "variant/a/1.png"],
        ["variant/b/0.png", "variant/b/1.png"],
    ]
    assert str(found) == "2 invariant pictures, 4 variant ones of 2 subjects"
    first = found.subjects[0][0]
    assert first.caption() == "portrait number 2"
    assert first.pixels().shape == (1, 64, 80, 3)
    mask = first.mask()
    assert mask[0, 30, 40] == 1
    assert mask[0, 5, 5] == 0
    assert found.invariant[0].mask() is None


def test_pictures_are_read_as_they_are_seen(tmp_path: Path, pack: ModuleType) -> None:
    picture = pack.nodes.host.flexip_folders.Picture
    turned, exif = flexips.picture(1), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert picture(tmp_path / "turned.jpg", "t").pixels().shape == (1, 80, 64, 3)
    clear = turned.copy()
    clear.putalpha(100)
    clear.save(tmp_path / "clear.webp")
    assert picture(tmp_path / "clear.webp", "c").pixels().shape == (1, 64, 80, 4)
    turned.convert("L").save(tmp_path / "grey.png")
    assert picture(tmp_path / "grey.png", "g").pixels().shape == (1, 64, 80, 3)
    fine = np.linspace(0, 65535, 64 * 80).reshape(64, 80)
    Image.fromarray(fine.astype(np.uint16)).save(tmp_path / "fine.png")
    Image.fromarray(fine.astype(np.uint16)).save(tmp_path / "fine.mask.png")
    expected = torch.from_numpy(fine / 65535).float()
    found = picture(tmp_path / "fine.png", "f")
    torch.testing.assert_close(found.pixels()[0, ..., 1], expected, rtol=0, atol=1 / 400)
    torch.testing.assert_close(found.mask()[0], expected, rtol=0, atol=1 / 400)


def nothing(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.unlink()


def one_of_a_subject(root: Path) -> None:
    (root / "variant" / "b" / "1.png").unlink()


def beside_subjects(root: Path) -> None:
    flexips.picture(1).save(root / "variant" / "loose.png")


def too_deep(root: Path) -> None:
    (root / "invariant" / "beach").mkdir()
    flexips.picture(1).save(root / "invariant" / "beach" / "sea.jpg")


def no_captions(root: Path) -> None:
    for path in root.rglob("*.txt"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nothing, r"folder .*set has no pictures in invariant or in folders of variant: put PNG"),
        (one_of_a_subject, "folder variant/b has one picture, and a subject needs two or more"),
        (beside_subjects, r"picture variant/loose\.png lies where it is not used: put pictures in"),
        (too_deep, r"picture invariant/beach/sea\.jpg lies where it is not used"),
        (
            no_captions,
            r"captions are missing for invariant/0\.png, invariant/1\.png, variant/a/0\.png and 3 "
            r"more: .* such as invariant/0\.txt",
        ),
    ],
)
def test_folders_that_cannot_be_used(
    root: Path, pack: ModuleType, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(root)
    with pytest.raises(ValueError, match=message):
        pack.nodes.host.flexip_folders.found(root)


@pytest.mark.parametrize("name", ["", ".", "..", "../output", "/etc", "a/../..", "nul\0"])
def test_folders_outside_of_input_are_refused(pack: ModuleType, name: str) -> None:
    folders = pack.nodes.host.flexip_folders
    with pytest.raises(ValueError, match=re.escape(f"folder is '{name}': write the name of")):
        folders.inside_input(name)


def test_links_out_of_input_are_refused(pack: ModuleType, tmp_path: Path) -> None:
    import folder_paths

    folders = pack.nodes.host.flexip_folders
    link = Path(folder_paths.get_input_directory()) / "leads_out"
    link.symlink_to(tmp_path)
    try:
        with pytest.raises(ValueError, match="folder is 'leads_out'"):
            folders.inside_input("leads_out")
    finally:
        link.unlink()


def test_fingerprint_changes_with_pictures_masks_and_captions(root: Path, pack: ModuleType) -> None:
    fingerprint = pack.nodes.host.flexip_folders.fingerprint
    seen = {fingerprint(root)}
    (root / "invariant" / "0.txt").write_text("another caption", "utf-8")
    seen.add(fingerprint(root))
    flexips.picture(9).save(root / "invariant" / "0.png")
    seen.add(fingerprint(root))
    (root / "variant" / "a" / "0.mask.png").unlink()
    seen.add(fingerprint(root))
    (root / "encoded").mkdir()
    seen.add(fingerprint(root))
    assert len(seen) == 4
