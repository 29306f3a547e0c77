"""Public IP-Adapter files: which are read, as what, and what is said of others."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from host import diffusers_unet, ip_adapters
from host.inprocess import Host

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def files(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.ip_adapter_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Host) -> Path:  # noqa: ARG001
    return ip_adapters.folder(tmp_path, monkeypatch)


# Public files


@pytest.mark.parametrize("name", ip_adapters.PUBLIC)
def test_public_files_by_their_keys_and_shapes(
    files: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Sizes of gigabytes are not written, but read as they would come from a file."""
    shapes = ip_adapters.public_shapes(name)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    monkeypatch.setattr(files.tensor_files, "path_of", lambda _kind, file, _input: Path(file))
    monkeypatch.setattr(files.tensor_files, "read", lambda _: (tensors, {}))
    adapter = files.load(f"{name}.safetensors", f"{name}.safetensors")
    family, kind, image_width = ip_adapters.PUBLIC[name]
    assert (adapter.name, adapter.family, adapter.mode) == (name, family, "linear")
    assert adapter.text_width is None
    assert list(adapter.blocks.values()) == ip_adapters.WIDTHS[family]
    assert adapter.preservation.image_width == image_width
    assert adapter.preservation.network.state_dict().keys() == shapes.keys()
    assert f"preservation: {name}, {kind}: " in adapter.about
    assert f"width {image_width}" in adapter.about


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_numbers_are_those_of_diffusers_attentions(files: ModuleType, family: str) -> None:
    numbers = files.FAMILIES[family].numbers
    found = {(b.kind, b.index, b.part): int(number) for b, number in numbers.items()}
    expected = diffusers_unet.numbers(family)
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize(
    ("family", "model"), [("SD15", "sd15_whole"), ("SDXL", "sdxl_whole")], ids=["SD15", "SDXL"]
)
def test_blocks_are_all_that_a_model_has(
    files: ModuleType, pack: ModuleType, tiny_model: Callable[[str], Any], family: str, model: str
) -> None:
    widths = pack.nodes.host.layouts.attention_widths(tiny_model(model))
    blocks = files.FAMILIES[family].blocks
    assert {*blocks} == widths.keys()
    assert len(blocks) == len(widths)
    assert [widths[b] for b in blocks] == [w // 10 for w in ip_adapters.WIDTHS[family]]


# Branches


@pytest.mark.parametrize("kind", ["global", "plus", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_those_of_the_file(
    files: ModuleType, folder: Path, kind: str, dtype: torch.dtype
) -> None:
    weights = {key: t.to(dtype) for key, t in ip_adapters.weights(kind).items()}
    name = ip_adapters.write(folder, kind, weights)
    network = files.load(name, name).preservation.network
    found = network.state_dict()
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], tensor)
    assert not any(p.requires_grad or p.is_inference() for p in network.parameters())


def test_two_files_are_two_branches(files: ModuleType, folder: Path) -> None:
    (folder / "sd15").mkdir()
    kept = ip_adapters.write(folder / "sd15", "plus", ip_adapters.weights("plus"))
    free = ip_adapters.write(folder, "whole", ip_adapters.weights("global"))
    assert sorted(files.names()) == [str(Path("sd15") / kept), free]
    adapter = files.load(str(Path("sd15") / kept), free)
    assert adapter.name == f"{Path('sd15') / 'plus'} and whole"
    assert adapter.preservation.image_width == ip_adapters.HIDDEN
    assert adapter.personalization.image_width == ip_adapters.HIGH
    lines = adapter.about.splitlines()
    assert lines[0] == "IP-Adapters for SD15"
    assert lines[1].endswith("plus, plus: 16 tokens from hidden states of width 40")
    assert lines[2].endswith("whole, global: 4 tokens from an embedding of width 24")
    parts = {id(m) for m in adapter.patcher.model.modules()}
    assert {id(adapter.preservation.network), id(adapter.personalization.network)} <= parts


def test_one_file_for_both_is_kept_once(files: ModuleType, folder: Path) -> None:
    weights = ip_adapters.weights("global")
    name = ip_adapters.write(folder, "whole", weights)
    adapter = files.load(name, name)
    assert adapter.name == "whole"
    assert adapter.preservation is adapter.personalization
    kept = sum(p.numel() for p in adapter.patcher.model.parameters())
    assert kept == sum(t.numel() for t in weights.values())


# Refusals


def another(**changes: Tensor | None) -> Callable[[Weights], bytes]:
    """The file with other tensors in it, `_` for dots; None leaves one out."""

    def damage(weights: Weights) -> bytes:
        changed = {**weights, **{key.replace("__", "."): t for key, t in changes.items()}}
        return safetensors.torch.save({k: t for k, t in changed.items() if t is not None})

    return damage


def renamed(pattern: str, replacement: str) -> Callable[[Weights], bytes]:
    """The file with other names in it."""
    return lambda weights: safetensors.torch.save(
        {re.sub(pattern, replacement, key): tensor for key, tensor in weights.items()}
    )


def only(*keys: str) -> Callable[[Weights], bytes]:
    """A file of tensors that an IP-Adapter has not."""
    return lambda _: safetensors.torch.save({key: torch.ones(4, 4) for key in keys})


def pickled(weights: Weights) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def cut(weights: Weights) -> bytes:
    return safetensors.torch.save(weights)[:-100]


ROW = torch.ones(1)
TRANSFORMER = "an IP-Adapter for a transformer such as Flux or SD3: choose a global, plus or full"
FACE_ID = "a FaceID adapter, which reads faces with InsightFace, not CLIP: choose a global, plus or"
UNKNOWN = "so it is no IP-Adapter: choose a global, plus or full-face"
LAYER = "ip_adapter__31__to_k_ip__weight"
DAMAGES: dict[str, tuple[str, Callable[[Weights], bytes], str]] = {
    "empty": ("global", lambda _: b"", "cannot be read"),
    "cut": ("global", cut, "cannot be read"),
    "pickle": ("global", pickled, "cannot be read"),
    "nothing": ("global", only(), "which is damaged: image_proj.norm.weight is missing"),
    "nan": ("global", another(image_proj__proj__bias=ROW * torch.nan), "image_proj.proj.bias hol"),
    "integers": ("global", another(image_proj__proj__bias=ROW.int()), "image_proj.proj.bias hol"),
    "a LoRA": ("global", only("lora_unet_mid.lora_up.weight"), f"mid.lora_up.weight, {UNKNOWN}"),
    "a UNet": ("global", only("model.diffusion_model.out.2.bias"), f"el.out.2.bias, {UNKNOWN}"),
    "more": ("global", another(image_proj__more=ROW), "1 of its tensors are missing, too many or"),
    "other biases": ("global", another(ip_adapter__1__to_k_ip__bias=ROW), f"k_ip.bias, {UNKNOWN}"),
    "FaceID": ("global", renamed(r"proj\.proj\.", "proj.proj.0."), FACE_ID),
    "FaceID with a LoRA": ("global", another(ip_adapter__0__to_q_lora__up__weight=ROW), FACE_ID),
    "FaceID Plus": ("plus", renamed("image_proj", "image_proj.perceiver_resampler"), FACE_ID),
    "Flux": (
        "global",
        only("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"),
        TRANSFORMER,
    ),
    "Flux in numbers": ("global", another(ip_adapter__0__to_k_ip__weight=ROW), TRANSFORMER),
    "SD3": ("plus", another(ip_adapter__1__norm_ip__linear__weight=ROW), TRANSFORMER),
    "a layer is missing": ("plus", another(**{LAYER: None}), "31.to_k_ip.weight is missing"),
    "both of it": (
        "plus",
        another(**{LAYER: None, LAYER.replace("_k_", "_v_"): None}),
        r"which has 15 attentions for tokens of width 768, where Pinpoint knows 16 for tokens of "
        r"width 768 \(SD15\) and 70 for tokens of width 2048 \(SDXL\)",
    ),
    "another width": (
        "global",
        another(image_proj__norm__weight=torch.ones(64)),
        "of width 64, wh",
    ),
    "a scalar": ("global", another(**{LAYER: torch.tensor(1.0)}), r"31.to_k_ip.weight is \[\]"),
    "no rows": ("global", another(image_proj__norm__weight=torch.ones(0)), r"norm.weight is \[0\]"),
    "few rows": (
        "global",
        another(image_proj__proj__weight=torch.ones(1, 24)),
        "has 1 rows for tokens",
    ),
    "flat latents": ("plus", another(image_proj__latents=torch.ones(16, 128)), "latents is"),
    "two latents": (
        "plus",
        another(image_proj__latents=torch.ones(2, 16, 128)),
        "first is image_pr",
    ),
    "odd attention": (
        "plus",
        another(image_proj__layers__0__0__to_q__weight=torch.ones(100, 128)),
        "whose attention is 100 wide, which is no multiple of 64",
    ),
    "a layer less": (
        "plus",
        renamed(r"layers\.3\.", "layers.7."),
        "of its tensors are missing, to",
    ),
    "no layers": ("plus", renamed("layers", "others"), "layers.0.0.to_q.weight is missing"),
    "half a projection": (
        "full",
        another(image_proj__proj__0__weight=None),
        "proj.0.weight is mis",
    ),
}


@pytest.mark.parametrize(("kind", "damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_other_files_are_refused_in_a_sentence(
    files: ModuleType, folder: Path, kind: str, damage: Callable[[Weights], bytes], said: str
) -> None:
    good = ip_adapters.write(folder, "good", ip_adapters.weights("global"))
    path = folder / "bad.safetensors"
    path.write_bytes(damage(ip_adapters.weights(kind)))
    for role, names in (
        ("preservation", (path.name, good)),
        ("personalization", (good, path.name)),
    ):
        with pytest.raises(ValueError, match=said) as refusal:
            files.load(*names)
        assert str(refusal.value).startswith(
            (f"{role} is bad.safetensors, ", "file bad.safetensors")
        )


def test_files_for_different_models_are_refused(
    files: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(files.FAMILIES, "SDXL", replace(files.FAMILIES["SDXL"], width=64))
    sd15 = ip_adapters.write(folder, "sd15", ip_adapters.weights("global"))
    sdxl = ip_adapters.write(folder, "sdxl", ip_adapters.weights("global", "SDXL", width=64))
    with pytest.raises(
        ValueError,
        match=r"preservation is sdxl\.safetensors, for SDXL, and personalization is sd15\.safete"
        r"nsors, for SD15: choose two files for the same family",
    ):
        files.load(sdxl, sd15)
    weights = ip_adapters.weights("global")
    for part in "kv":
        weights[f"ip_adapter.1.to_{part}_ip.weight"] = torch.ones(64, 768)
    wide = ip_adapters.write(folder, "wide", weights)
    with pytest.raises(ValueError, match=r"made for another size of SD15: choose two files for th"):
        files.load(sd15, wide)


def test_a_file_that_is_gone_is_refused(files: ModuleType, folder: Path) -> None:
    assert not list(folder.iterdir())
    with pytest.raises(
        ValueError, match=r"preservation is gone\.safetensors, which is not in models"
    ):
        files.load("gone.safetensors", "gone.safetensors")


# The folder


@pytest.fixture
def unregistered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Host) -> Path:  # noqa: ARG001
    """Where models are; no pack has spoken of IP-Adapters."""
    import folder_paths

    # What a test registers is taken away again.
    known = dict(folder_paths.folder_names_and_paths)
    known.pop("ipadapter", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.delitem(folder_paths.filename_list_cache, "ipadapter", raising=False)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path


def test_the_folder_is_known_as_soon_as_it_is_there(files: ModuleType, unregistered: Path) -> None:
    import folder_paths

    assert files.names() == []
    assert "ipadapter" not in folder_paths.folder_names_and_paths
    (unregistered / "ipadapter").mkdir()
    (unregistered / "ipadapter" / "old.bin").touch()
    name = ip_adapters.write(unregistered / "ipadapter", "one", {})
    assert files.names() == [name]
    assert folder_paths.get_folder_paths("ipadapter") == [str(unregistered / "ipadapter")]


def test_another_packs_folder_is_left_alone(files: ModuleType, folder: Path) -> None:
    import folder_paths

    before = folder_paths.folder_names_and_paths["ipadapter"]
    files.register_folder()
    assert folder_paths.folder_names_and_paths["ipadapter"] is before
    assert before == ([str(folder)], {".safetensors", ".bin"})
