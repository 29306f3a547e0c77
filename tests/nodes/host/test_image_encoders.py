"""Image encoders of any size, from files in the layouts that are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from host import stock
from host.inprocess import Host
from host.tiny_encoders import (
    CLIP,
    DINO,
    WIDTH,
    Tensors,
    built,
    in_classifier,
    open_clip,
    whole_clip,
)
from portraits import weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Host) -> Path:  # noqa: ARG001
    """An empty models/clip_vision."""
    import folder_paths

    kind = "clip_vision"
    _, endings = folder_paths.folder_names_and_paths[kind]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], endings))
    monkeypatch.delitem(folder_paths.filename_list_cache, kind, raising=False)
    return tmp_path


@pytest.fixture
def encoders(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.image_encoders


def picture(size: int = 40) -> Tensor:
    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(1))


def load(name: str = "encoder.safetensors", activation: str = "auto") -> Any:
    return stock.call("PinpointLoadImageEncoder", file_name=name, activation=activation)[0]


def require_same(found: Any, expected: Any) -> None:
    """Both see the same, to the last bit."""
    one, other = found.encode_image(picture()), expected.encode_image(picture())
    for name in ("last_hidden_state", "penultimate_hidden_states", "image_embeds"):
        assert torch.equal(one[name], other[name]), name
    assert found.model_type == expected.model_type
    assert found.image_size == expected.image_size


# What is loaded


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Any], Tensors]]] = {
    "clip": (CLIP, lambda encoder: dict(encoder.get_sd())),
    "whole clip": (CLIP, whole_clip),
    "open clip": (CLIP, open_clip),
    "clip without projection": (
        {key: value for key, value in CLIP.items() if key != "projection_dim"},
        lambda encoder: dict(encoder.get_sd()),
    ),
    "dino": (DINO, lambda encoder: dict(encoder.get_sd())),
    "dino in a classifier": (DINO, in_classifier),
    "dino with gated layers": (
        {**DINO, "use_swiglu_ffn": True},
        lambda encoder: dict(encoder.get_sd()),
    ),
}


@pytest.mark.parametrize(("config", "stored"), LAYOUTS.values(), ids=LAYOUTS)
def test_an_encoder_of_any_size_is_the_stock_object(
    folder: Path, config: dict[str, Any], stored: Callable[[Any], Tensors]
) -> None:
    expected = built(config)
    save_file(stored(expected), folder / "encoder.safetensors")
    require_same(load(), expected)


def test_stock_nodes_take_it(folder: Path) -> None:
    encoder = built(CLIP)
    save_file(encoder.get_sd(), folder / "encoder.safetensors")
    output = stock.call("CLIPVisionEncode", clip_vision=load(), image=picture(), crop="center")[0]
    assert output.image_embeds.shape == (1, 48)


@pytest.mark.parametrize("file", [weights.low_encoder_file, weights.high_encoder_file])
def test_the_demo_encoders_are_offered(host: Host, file: Path) -> None:  # noqa: ARG001
    encoder = load(file.name)
    output = encoder.encode_image(torch.rand(2, 128, 128, 3))
    assert output.last_hidden_state.shape == (2, 65, 128)
    assert output.image_embeds.shape == (2, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_precision_is_read(folder: Path, dtype: torch.dtype) -> None:
    expected = built(CLIP)
    rounded = {name: tensor.to(dtype) for name, tensor in expected.get_sd().items()}
    save_file(rounded, folder / "encoder.safetensors")
    expected.load_sd({name: tensor.float() for name, tensor in rounded.items()})
    require_same(load(), expected)


def test_its_values_can_be_trained_behind(folder: Path) -> None:
    """ComfyUI's executor runs nodes in inference mode."""
    save_file(built(CLIP).get_sd(), folder / "encoder.safetensors")
    assert not any(parameter.is_inference() for parameter in load().model.parameters())


def test_another_file_of_the_same_name_is_loaded_anew(folder: Path, host: Host) -> None:
    node: Any = host.nodes["PinpointLoadImageEncoder"]
    inputs = {"file_name": "encoder.safetensors", "activation": "auto"}
    save_file(built(CLIP).get_sd(), folder / "encoder.safetensors")
    first = node.fingerprint_inputs(**inputs)
    assert node.fingerprint_inputs(**inputs) == first
    save_file(built(DINO).get_sd(), folder / "encoder.safetensors")
    assert node.fingerprint_inputs(**inputs) != first


# Stock sizes


def stock_configs() -> list[dict[str, Any]]:
    import comfy.clip_vision

    root = Path(comfy.clip_vision.__file__).parent
    files = [*root.glob("clip_vision_config_*.json"), *root.glob("image_encoders/dino2_*.json")]
    configs = [json.loads(file.read_text("utf-8")) for file in files]
    return [config for config in configs if "projector_type" not in config]


def on_meta(config: dict[str, Any]) -> Tensors:
    """The tensors of a full-size encoder, without their memory."""
    import comfy.clip_vision
    import comfy.ops

    kind = comfy.clip_vision.IMAGE_ENCODERS[config["model_type"]]
    with torch.device("meta"):
        made = kind(config, torch.float32, torch.device("meta"), comfy.ops.manual_cast)
    tensors: Tensors = made.state_dict()
    return tensors


def test_sizes_that_comfyui_knows_are_read_as_it_reads_them(encoders: ModuleType) -> None:
    configs = stock_configs()
    assert len(configs) >= 6
    for known in configs:
        config = encoders._config(on_meta(known), "file")
        if known["model_type"] == "clip_vision_model":
            config["hidden_act"] = encoders._activation("auto", None, config["hidden_size"])
        assert encoders._is_stock(config)
        assert {key: known.get(key) for key in config} == config


def of_width(base: dict[str, Any], width: int, layers: int, size: int, patch: int) -> Any:
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "num_hidden_layers": layers}
    if "intermediate_size" in base:
        sizes |= {"intermediate_size": 4 * width, "projection_dim": 512}
    return {**base, **sizes, "image_size": size, "patch_size": patch}


SMALL = {
    "CLIP ViT-B/32": (CLIP, 768, 12, 224, 32),
    "CLIP ViT-B/16": (CLIP, 768, 12, 224, 16),
    "DINOv2 small": (DINO, 384, 12, 518, 14),
    "DINOv2 base": (DINO, 768, 12, 518, 14),
}
"""Published sizes that ComfyUI's loader refuses."""


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
def test_sizes_that_comfyui_does_not_know_are_inferred(encoders: ModuleType, sizes: Any) -> None:
    import comfy.clip_vision

    expected = of_width(*sizes)
    tensors = on_meta(expected)
    assert comfy.clip_vision.load_clipvision_from_sd(dict(tensors)) is None
    found = encoders._config(tensors, "file")
    if expected["model_type"] == "clip_vision_model":
        found["hidden_act"] = encoders._activation("auto", None, found["hidden_size"])
    assert found == expected
    assert not encoders._is_stock(found)
    assert set(encoders._needed(found, tensors, "file")) == set(tensors)


def test_another_activation_is_not_given_to_the_stock_loader(encoders: ModuleType) -> None:
    large = next(c for c in stock_configs() if c["num_hidden_layers"] == 24 and "hidden_act" in c)
    config = encoders._config(on_meta(large), "file")
    assert not encoders._is_stock({**config, "hidden_act": "relu"})


def test_known_sizes_go_through_the_stock_loader(
    folder: Path, encoders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.clip_vision

    save_file(built(CLIP).get_sd(), folder / "encoder.safetensors")
    monkeypatch.setattr(encoders, "_is_stock", lambda _: True)
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: f"stock {path}")
    assert load() == f"stock {folder / 'encoder.safetensors'}"


# The activation


def activation_of(metadata: dict[str, str] | None, chosen: str, folder: Path) -> str:
    save_file(built(CLIP).get_sd(), folder / "encoder.safetensors", metadata)
    found: str = load(activation=chosen).config["hidden_act"]
    return found


def test_the_activation_is_what_is_chosen_else_what_the_file_says(folder: Path) -> None:
    said = {"hidden_act": "gelu"}
    assert activation_of(None, "auto", folder) == "quick_gelu"
    assert activation_of(None, "gelu", folder) == "gelu"
    assert activation_of(said, "auto", folder) == "gelu"
    assert activation_of(said, "quick_gelu", folder) == "quick_gelu"
    assert activation_of({"hidden_act": "selu"}, "auto", folder) == "quick_gelu"


def test_wide_encoders_are_taken_for_those_of_laion(encoders: ModuleType) -> None:
    widths = {512: "quick_gelu", 768: "quick_gelu", 1024: "quick_gelu", 1280: "gelu", 1664: "gelu"}
    assert {width: encoders._activation("auto", None, width) for width in widths} == widths


def test_published_heads_are_known(encoders: ModuleType) -> None:
    shapes = encoders._Shapes({}, "file")
    published = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
    assert {width: shapes.heads(width) for width in published} == published


# Damaged and other files


def another(config: dict[str, Any], changes: dict[str, Tensor | None] | None = None) -> bytes:
    """A file with other tensors in it; None leaves one out."""
    tensors = {**built(config).get_sd(), **(changes or {})}
    return save({name: t.contiguous() for name, t in tensors.items() if t is not None})


CLASS = "vision_model.embeddings.class_embedding"
PATCH = "vision_model.embeddings.patch_embedding.weight"
PLACES = "vision_model.embeddings.position_embedding.weight"
OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut": (lambda: another(CLIP)[:-100], "which cannot be read .* download it again"),
    "empty": (lambda: b"", "which cannot be read"),
    "huge header": (
        lambda: (2**62).to_bytes(8, "little") + another(CLIP)[8:],
        "which cannot be read",
    ),
    "nothing": (lambda: save({}), "which is no CLIP or DINOv2 in the names of Hugging"),
    "a lora": (lambda: save({"lora_up.weight": torch.ones(4, 4)}), "which is no CLIP or DINOv2"),
    "siglip": (
        lambda: another(CLIP, {CLASS: None}),
        "no CLIP or DINOv2 .* or try ComfyUI's Load CLIP Vision",
    ),
    "registers": (
        lambda: another(DINO, {"embeddings.register_tokens": torch.ones(1, 4, WIDTH)}),
        "a DINOv2 with registers, which ComfyUI cannot run: download the one without",
    ),
    "no layers": (
        lambda: save(
            {
                CLASS: torch.ones(WIDTH),
                PLACES: torch.ones(5, WIDTH),
            }
        ),
        "which is damaged: layers are missing",
    ),
    "layers without end": (
        lambda: another(CLIP, {"vision_model.encoder.layers.999.x": torch.ones(1)}),
        "which is damaged: layers are missing",
    ),
    "a missing tensor": (
        lambda: another(CLIP, {"vision_model.encoder.layers.1.mlp.fc2.bias": None}),
        r"damaged: vision_model\.encoder\.layers\.1\.mlp\.fc2\.bias is missing; download",
    ),
    "a tensor of another shape": (
        lambda: another(DINO, {"layernorm.weight": torch.ones(7)}),
        r"damaged: layernorm\.weight is \[7\]; download it again",
    ),
    "a flat projection": (
        lambda: save({**open_clip(built(CLIP)), "visual.proj": torch.ones(WIDTH)}),
        "damaged: tensors are too flat; download it again",
    ),
    "a flat class token": (
        lambda: another(DINO, {"embeddings.cls_token": torch.ones(WIDTH)}),
        r"damaged: embeddings\.cls_token is \[128\]",
    ),
    "no width": (
        lambda: another(CLIP, {CLASS: torch.ones(0)}),
        r"damaged: vision_model\.embeddings\.class_embedding is \[0\]",
    ),
    "no patch": (
        lambda: another(CLIP, {PATCH: torch.ones(WIDTH, 3, 0, 0)}),
        r"damaged: .*patch_embedding\.weight is \[128, 3, 0, 0\]",
    ),
    "oblong": (
        lambda: another(CLIP, {PLACES: torch.ones(7, WIDTH)}),
        "whose 7 positions are not those of a square picture",
    ),
    "a width of no heads": (
        lambda: another({**CLIP, "hidden_size": 96}),
        "whose width of 96 is no multiple of 64, so its heads are not known",
    ),
    "wide without end": (
        lambda: another(
            CLIP,
            {
                CLASS: torch.ones(64 * 10**4),
                PLACES: torch.ones(2, 64 * 10**4),
            },
        ),
        r"damaged: vision_model\.encoder\.layers\.0\.mlp\.fc1\.weight is \[320, 128\]",
    ),
    "nan": (
        lambda: another(CLIP, {CLASS: torch.full((WIDTH,), torch.nan)}),
        r"damaged: vision_model\.embeddings\.class_embedding holds values that are not finite",
    ),
    "integers": (
        lambda: another(CLIP, {CLASS: torch.ones(WIDTH).int()}),
        "class_embedding holds values that are not finite",
    ),
}


@pytest.mark.parametrize(("content", "said"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused_in_a_sentence(
    folder: Path, content: Callable[[], bytes], said: str
) -> None:
    (folder / "encoder.safetensors").write_bytes(content())
    with pytest.raises(ValueError, match=rf"file_name is encoder\.safetensors, .*{said}") as error:
        load()
    assert "\n" not in str(error.value)


def test_a_file_that_is_gone_is_refused(folder: Path, encoders: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"file_name is gone\.safetensors"):
        encoders.load("gone.safetensors")
    (folder / "pickle.pt").write_bytes(b"")
    assert encoders.names() == []
