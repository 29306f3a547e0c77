"""Pairs of a folder's pictures: what is refused, encoded, kept and drawn."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from host import flexips, stock, tiny_clip

TinyModel = Callable[[str], Any]
SIDE = 64


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return flexips.folder(tmp_path / "set")


@pytest.fixture(scope="module")
def encoders(tiny_model: TinyModel, demo: stock.Demo, pack: ModuleType) -> Any:
    return pack.nodes.host.flexip_pairs.Encoders(
        model=tiny_model("sd3_bare"),
        clip=tiny_clip.clip(),
        vae=demo.vae,
        low=flexips.encoder("dinov2"),
        high=flexips.encoder("clip_vision_model"),
    )


@pytest.fixture
def pairs_of(encoders: Any, pack: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Encoded pairs of a folder."""
    host = pack.nodes.host

    def made(root: Path, *args: Any, side: int = SIDE, encoders: Any = encoders) -> Any:
        with torch.inference_mode():
            store = host.flexip_pairs.Store(tmp_path / "cache", encoders)
            collection = host.flexip_folders.found(root)
            pairs = host.flexip_pairs.FolderPairs(collection, store, side, *args)
            pairs.encode(lambda _text: None)
        return pairs

    return made


def drawn(pairs: Any, count: int = 100) -> list[Any]:
    chance = random.Random(1)
    return [pairs.drawn(chance) for _ in range(count)]


def damaged_picture(root: Path) -> None:
    file = root / "invariant" / "1.png"
    file.write_bytes(file.read_bytes()[:200])


def no_picture(root: Path) -> None:
    (root / "invariant" / "1.png").write_text("hello", "utf-8")


def mask_of_another_size(root: Path) -> None:
    Image.new("L", (8, 9), 255).save(root / "variant" / "a" / "0.mask.png")


def black_mask(root: Path) -> None:
    Image.new("L", (80, 64)).save(root / "variant" / "a" / "0.mask.png")


def caption_that_is_no_text(root: Path) -> None:
    (root / "invariant" / "0.txt").write_bytes(b"\xff\xfe\xfd")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged_picture, r"picture invariant/1\.png cannot be read \(.*\): save it again"),
        (no_picture, r"picture invariant/1\.png cannot be read"),
        (mask_of_another_size, r"mask variant/a/0\.mask\.png is 8x9, its picture 80x64"),
        (black_mask, r"mask variant/a/0\.mask\.png is black, so there is no subject"),
        (caption_that_is_no_text, r"caption of invariant/0\.png cannot be read"),
    ],
)
def test_pictures_that_cannot_be_used(
    root: Path,
    pairs_of: Callable[..., Any],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(root)
    with pytest.raises(ValueError, match=message):
        pairs_of(root)


def test_a_picture_smaller_than_a_patch_is_named(root: Path, pairs_of: Any) -> None:
    flexips.picture(1, (8, 8)).save(root / "invariant" / "1.png")
    with pytest.raises(ValueError, match=r"picture invariant/1\.png: image shows .* 8x8 pixels"):
        pairs_of(root)


def test_resolution_is_one_of_the_vae(root: Path, pairs_of: Any) -> None:
    with pytest.raises(ValueError, match="resolution is 68, the VAE encodes cells of 8 pixels: ch"):
        pairs_of(root, side=68)


# What pairs are made of


def test_pairs_of_both_kinds(root: Path, pairs_of: Any, encoders: Any) -> None:
    pairs = pairs_of(root)
    found = pairs.collection
    expected: dict[str, dict[str, Tensor]] = {}
    for picture in found.pictures:
        image = picture.pixels()
        seen = encoders.seen(image, picture.mask())
        latent = encoders.latent(image[:, :, 8:72], SIDE)
        expected[picture.name] = {**seen, "latent": latent}

    def owner(key: str, tensor: Tensor) -> str:
        (name,) = (
            n
            for n, parts in expected.items()
            if torch.allclose(parts[key].float(), tensor.float(), rtol=1e-3, atol=2e-3)
        )
        return name

    seen_pairs = set()
    for pair in drawn(pairs):
        reference, target = owner("low", pair.low), owner("latent", pair.latent)
        assert owner("high", pair.high) == reference
        assert pair.invariant == (reference == target)
        assert pair.invariant == target.startswith("invariant/")
        assert Path(reference).parent == Path(target).parent
        (text,) = {p.caption() for p in found.pictures if p.name == target}
        tokens = encoders.clip.encode_from_tokens(encoders.clip.tokenize(text))
        torch.testing.assert_close(pair.text.float(), tokens[0], rtol=1e-3, atol=2e-3)
        seen_pairs.add((reference, target))
    assert len(seen_pairs) == 2 + 4
    assert pairs.widths == (64, 48, 64)


def test_the_mask_removes_the_background_of_a_reference(root: Path, pairs_of: Any) -> None:
    before = pairs_of(root).fixed()
    whole = Image.new("RGB", (80, 64), (250, 0, 0))
    file = root / "variant" / "a" / "0.png"
    with Image.open(file) as picture:
        whole.paste(picture.crop((20, 10, 60, 50)), (20, 10))
    whole.save(file)
    after = pairs_of(root).fixed()
    torch.testing.assert_close(after.low, before.low)
    assert not torch.equal(pairs_of(root).drawn(random.Random(0)).latent, before.latent)


@pytest.mark.parametrize(
    ("augmentation", "views"), [("none", 1), ("flip", 2), ("flip and crop", 4)]
)
def test_augmentation_is_of_invariant_references_only(
    root: Path, pairs_of: Any, augmentation: str, views: int
) -> None:
    pairs = pairs_of(root, augmentation)
    seen: dict[bool, set[tuple]] = {True: set(), False: set()}
    for pair in drawn(pairs, 200):
        key = (pair.latent.sum().item(), pair.high.sum().item())
        seen[pair.invariant].add(key)
    assert len(seen[True]) == 2 * views
    assert len(seen[False]) == 4


def test_a_crop_never_loses_the_subject(pack: ModuleType) -> None:
    cropped = pack.nodes.host.flexip_pairs._cropped
    image, mask = torch.rand(1, 20, 30, 3), torch.zeros(1, 20, 30)
    mask[:, 0, 0] = 1
    chance, whole = random.Random(2), 0
    for _ in range(40):
        part, kept = cropped(image, mask, chance)
        assert kept.any()
        assert part.shape[:3] == kept.shape
        whole += part is image
    assert 0 < whole < 40


def test_share_of_invariant_pairs(root: Path, pairs_of: Any) -> None:
    found = [pair.invariant for pair in drawn(pairs_of(root, "none", 0.2), 400)]
    assert sum(found) / 400 == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize(("invariant", "subjects"), [(2, 0), (0, 2)])
def test_a_folder_of_one_kind(tmp_path: Path, pairs_of: Any, invariant: int, subjects: int) -> None:
    root = flexips.folder(tmp_path / "one", invariant=invariant, subjects=subjects)
    pairs = pairs_of(root, "none", 0.5)
    assert {pair.invariant for pair in drawn(pairs, 20)} == {subjects == 0}
    assert pairs.fixed().invariant == (subjects == 0)
    assert pairs.goal().shape == (1, SIDE, SIDE, 3)


# What is kept


def test_everything_is_encoded_once(root: Path, pairs_of: Any, encoders: Any) -> None:
    first = pairs_of(root)
    calls = count_calls(encoders)
    with pytest.MonkeyPatch.context() as patch:
        for name, counted in calls.items():
            patch.setattr(type(encoders), name, counted)
        again = pairs_of(root)
        assert calls["seen"].names == calls["text"].names == 1, "the question who the encoders are"
        # Another picture, another caption.
        flexips.picture(7).save(root / "invariant" / "0.png")
        (root / "invariant" / "1.txt").write_text("somebody else", "utf-8")
        pairs_of(root)
    assert calls["seen"].names == 2 + 1
    assert calls["text"].names == 2 + 1
    for one, other in zip(drawn(first, 10), drawn(again, 10), strict=True):
        assert torch.equal(one.low, other.low)
        assert torch.equal(one.text, other.text)


class Counted:
    """A method that counts its calls."""

    def __init__(self, true: Callable[..., Any]):
        self.true, self.names = true, 0

    def __get__(self, instance: Any, _owner: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.names += 1
            return self.true(instance, *args)

        return call


def count_calls(encoders: Any) -> dict[str, Counted]:
    return {name: Counted(getattr(type(encoders), name)) for name in ("seen", "text")}


def test_other_encoders_have_files_of_their_own(
    root: Path, pairs_of: Any, encoders: Any, pack: ModuleType
) -> None:
    first = pairs_of(root)
    other = pack.nodes.host.flexip_pairs.Encoders(
        **{**vars(encoders), "low": flexips.encoder("dinov2", 128)}
    )
    second = pairs_of(root, encoders=other)
    assert second.widths == (128, 48, 64)
    assert pairs_of(root).store.folder == first.store.folder != second.store.folder


def test_an_interrupted_encoding_goes_on(
    root: Path, pairs_of: Any, encoders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy.utils

    def stop(_bar: Any, value: int, *_args: Any) -> None:
        if value == 4:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        # Its hook is not called for every picture.
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            pairs_of(root)
    calls = count_calls(encoders)
    for name, counted in calls.items():
        monkeypatch.setattr(type(encoders), name, counted)
    pairs_of(root)
    assert calls["seen"].names == 1 + 2


def test_shares_of_several_processes_make_the_whole(
    root: Path, encoders: Any, pack: ModuleType, tmp_path: Path
) -> None:
    host = pack.nodes.host
    store = host.flexip_pairs.Store(tmp_path / "shared", encoders)
    pairs = host.flexip_pairs.FolderPairs(host.flexip_folders.found(root), store, SIDE)
    said: list[str] = []
    for part in range(3):
        pairs.encode(said.append, part, 3)
    assert len(drawn(pairs, 30)) == 30
    assert sum(text.startswith("encoding ") for text in said) == 2 * len(pairs.collection.pictures)


def test_a_damaged_file_is_named(root: Path, pairs_of: Any) -> None:
    pairs = pairs_of(root)
    for file in pairs.store.folder.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
        os.utime(file)
    with pytest.raises(ValueError, match=r"file .*\.safetensors cannot be read .* delete"):
        drawn(pairs, 1)
