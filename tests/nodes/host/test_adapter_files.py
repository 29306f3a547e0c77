"""FlexIP files: whole, or a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from host import subjects
from host.comfyui import PACK
from host.tapping import FAMILIES, Family, few

TinyModel = Callable[[str], Any]


@pytest.fixture
def files(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.adapter_files


@pytest.fixture
def saved(pack: ModuleType, tiny_model: TinyModel, tmp_path: Path) -> Path:
    made = subjects.adapter(pack, tiny_model("sd3"), FAMILIES["SD3"])
    return subjects.save(pack, made, tmp_path / "tiny.safetensors")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def changed(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> Path:
    """The file with other tensors (None = without it) and metadata."""
    kept = {**load_file(path), **tensors}
    kept = {key: tensor for key, tensor in kept.items() if tensor is not None}
    save_file(kept, path, {**metadata_of(path), **metadata})
    return path


@few
def test_a_saved_adapter_acts_as_before(
    pack: ModuleType, files: ModuleType, tiny_model: TinyModel, tmp_path: Path, family: Family
) -> None:
    model = tiny_model(family.model)
    made = subjects.adapter(pack, model, family)
    for parameter in made.patcher.model.parameters():
        parameter.copy_(parameter.half().float())
    loaded = files.load_file(subjects.save(pack, made, tmp_path / "tiny.safetensors"))
    assert (loaded.name, loaded.family, loaded.mode) == ("tiny", made.family, "literal")
    assert (loaded.blocks, loaded.text_width) == (made.blocks, made.text_width)
    subject, settings = subjects.subject(pack), subjects.settings(pack)
    before, after = (
        family.velocity(pack.nodes.host.adapting.applied(model, adapter, subject, settings))
        for adapter in (made, loaded)
    )
    assert torch.equal(before, after)
    assert loaded.encoders == subjects.kinds(pack)
    assert all(str(kind) in loaded.about for kind in loaded.encoders)
    assert str(subjects.LOW) in loaded.about


def test_the_help_page_names_every_tensor_and_every_entry(saved: Path) -> None:
    page = (PACK / "web" / "docs" / "PinpointLoadFlexIP.md").read_text("utf-8")
    told = set(re.findall(r"\w+", page))
    for key in load_file(saved):
        parts = {part for part in key.split(".") if not part.isdecimal()}
        assert {part for part in parts if not part.startswith("joint_")} <= told, key
    assert metadata_of(saved).keys() <= told


def test_what_is_not_there_is_said(files: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"file_name is no\.safetensors, which is not in models/f"):
        files.load("no.safetensors")


@pytest.mark.parametrize("end", [0, 7, 100, -1])
def test_a_cut_file_is_refused(files: ModuleType, saved: Path, end: int) -> None:
    saved.write_bytes(saved.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"file tiny\.safetensors cannot be read"):
        files.load_file(saved)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"format": "other"}, "is no FlexIP adapter: load IP-Adapter files with IP-Adapter as"),
        ({"format_version": "2"}, "has format 2, this Pinpoint knows 1: update Pinpoint"),
        ({"mode": "loud"}, "its gate is loud, which is not one of literal, linear"),
        ({"sizes": "{"}, "its sizes cannot be read"),
        ({"sizes": "[]"}, "its sizes cannot be read"),
        ({"sizes": "[" * 100_000}, "its sizes cannot be read"),
        ({"blocks": '[["joint.0", 0, 0, 128]]'}, "its sizes cannot be read"),
        ({"family": ""}, "does not say its model family"),
        ({"encoders": "{"}, "its image encoders cannot be read"),
        ({"encoders": '[["dinov2", 1, 2, 3]]'}, "its image encoders cannot be read"),
        ({"encoders": '[["dinov2", 1], ["dinov2", Infinity, 2, 3]]'}, "its image encoders cannot"),
        ({"blocks": "[[5, 0, 0, 128]]"}, "its sizes cannot be read"),
        ({"blocks": '[["joint", 0, 0, 128], ["joint", 0, 0, 128]]'}, "blocks are listed twice"),
        ({"blocks": '[["joint", Infinity, 0, 128]]'}, "its sizes cannot be read"),
        ({"blocks": '[["joint", 0, 0, 1e9]]'}, "its sizes cannot be read"),
        ({"blocks": '[["joint", 0, 0, 128]]'}, "is not whole: 2 of its tensors are missing, too"),
    ],
)
def test_strange_metadata_is_refused(
    files: ModuleType, saved: Path, metadata: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        files.load_file(changed(saved, {}, metadata))


@pytest.mark.parametrize(
    ("name", "value"), [("width", 33), ("width", 0), ("width", 10**9), ("detail_depth", 65)]
)
def test_sizes_that_cannot_be_are_refused(
    files: ModuleType, saved: Path, name: str, value: int
) -> None:
    sizes = {**json.loads(metadata_of(saved)["sizes"]), name: value}
    with pytest.raises(ValueError, match="its sizes cannot be read"):
        files.load_file(changed(saved, {}, {"sizes": json.dumps(sizes)}))


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (None, "is not whole: 1 of its tensors are missing, too many or of another size"),
        (torch.zeros(2, 2), "is not whole: 1 of its tensors are missing, too many or of another"),
        (torch.tensor([float("nan")]), "is damaged: queries holds values that are not finite"),
        (torch.zeros(5, 32, dtype=torch.int32), "is damaged: queries holds values that are not"),
    ],
)
def test_strange_tensors_are_refused(
    files: ModuleType, saved: Path, tensor: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        files.load_file(changed(saved, {"queries": tensor}, {}))
    with pytest.raises(ValueError, match="first is strange"):
        files.load_file(
            changed(saved, {"queries": torch.zeros(5, 32), "strange": torch.ones(1)}, {})
        )


def test_eight_bit_weights_are_read(files: ModuleType, saved: Path) -> None:
    eight = load_file(saved)["queries"].to(torch.float8_e4m3fn)
    assert files.load_file(changed(saved, {"queries": eight}, {})).name == "tiny"
