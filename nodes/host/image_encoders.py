"""Image encoders of models/clip_vision, of any size, as ComfyUI's own CLIP_VISION.

ComfyUI tells encoders apart by their number of layers, and knows a few. Here the sizes are read
from the shapes of the tensors.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.ops
import torch
from comfy.clip_vision import ClipVisionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import tensor_files

folder = "clip_vision"
ACTIVATIONS = ("auto", "quick_gelu", "gelu")
"""Of CLIP; which one it was trained with cannot be seen in its tensors."""

_parts = ("vision_model.", "visual_projection.", "visual.", "embeddings.", "encoder.", "layernorm.")
_of_classifiers = "dinov2."
"""Before the names of an encoder that is a part of a larger model."""
_open_clip = "visual."
_head_width = 64
_heads = {1280: 16, 1408: 16, 1664: 16}
"""Width -> heads where these are wider than 64: ViT-H, g and bigG."""
_layer = re.compile(r"(?:vision_model\.)?encoder\.layers?\.(\d{1,3})\.")

_Tensors = dict[str, Tensor]
_Config = dict[str, Any]


def names() -> list[str]:
    """The safetensors files of models/clip_vision, with their folders."""
    return tensor_files.names(folder)


def path_to(file_name: str) -> Path:
    """The file of one of `names`.

    Raises:
        ValueError: it is not there.
    """
    return tensor_files.path_of(folder, file_name)


def load(file_name: str, activation: str = "auto") -> ClipVisionModel:
    """Read an image encoder.

    Args:
        file_name: one of `names`.
        activation: one of ACTIVATIONS; "auto" is what the file's metadata calls hidden_act, else
            gelu from a width of 1280 on, as LAION trained, and quick_gelu below, as OpenAI did.

    Raises:
        ValueError: the file is not there, not whole, or no CLIP or DINOv2 that can be built.
    """
    path = path_to(file_name)
    try:
        # Adapters are trained behind encoders: their tensors must not be bound to inference.
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if _is_part(key)]  # noqa: SIM118
            shapes = _renamed(
                {key: _empty(file.get_slice(key).get_shape()) for key in keys}, file_name
            )
            config = _config(shapes, file_name)
            if config["model_type"] == "clip_vision_model":
                told = (file.metadata() or {}).get("hidden_act")
                config["hidden_act"] = _activation(activation, told, config["hidden_size"])
            needed = _needed(config, shapes, file_name)
            if _is_stock(config):
                return comfy.clip_vision.load(str(path))
            tensors = _renamed({key: file.get_tensor(key) for key in keys}, file_name)
            return _built(config, {name: tensors[name] for name in needed}, file_name)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"file_name is {file_name}, which cannot be read ({error}): it is damaged or no "
            "safetensors file; download it again"
        ) from error


def _is_part(key: str) -> bool:
    return key.removeprefix(_of_classifiers).startswith(_parts)


def _empty(shape: list[int]) -> Tensor:
    return torch.empty(shape, device="meta")


def _renamed(tensors: _Tensors, file_name: str) -> _Tensors:
    """Under the names that Hugging Face gives them, and ComfyUI.

    Raises:
        ValueError: those of OpenCLIP have too few dimensions to be taken apart.
    """
    if f"{_open_clip}class_embedding" in tensors:
        try:
            return comfy.clip_vision.convert_to_transformers(tensors, _open_clip)
        except IndexError as error:
            raise _Shapes(tensors, file_name).damaged("tensors are too flat") from error
    return {key.removeprefix(_of_classifiers): tensor for key, tensor in tensors.items()}


def _config(tensors: _Tensors, file_name: str) -> _Config:
    """What `ClipVisionModel` builds an encoder from, but for CLIP's activation."""
    if "embeddings.register_tokens" in tensors:
        raise ValueError(
            f"file_name is {file_name}, a DINOv2 with registers, which ComfyUI cannot run: "
            "download the one without"
        )
    if "vision_model.embeddings.class_embedding" in tensors:
        return _clip_config(_Shapes(tensors, file_name))
    if "encoder.layer.0.layer_scale1.lambda1" in tensors:
        return _dino_config(_Shapes(tensors, file_name))
    raise ValueError(
        f"file_name is {file_name}, which is no CLIP or DINOv2 in the names of Hugging Face or "
        "OpenCLIP: download such a one, or try ComfyUI's Load CLIP Vision"
    )


class _Shapes:
    """The shapes of an encoder's tensors, and sizes that follow from them."""

    def __init__(self, tensors: _Tensors, file_name: str):
        self.tensors, self.file_name = tensors, file_name

    def of(self, name: str, *known: int | None) -> tuple[int, ...]:
        """The shape of a tensor; None stands for sizes of 1 or more.

        Raises:
            ValueError: it is missing or of another shape.
        """
        shape = tuple(self.tensors[name].shape) if name in self.tensors else ()
        fits = len(shape) == len(known) and all(
            size > 0 if wanted is None else size == wanted
            for size, wanted in zip(shape, known, strict=True)
        )
        if not fits:
            raise self.damaged(f"{name} is {list(shape) if name in self.tensors else 'missing'}")
        return shape

    def layers(self) -> int:
        """How many there are."""
        found = {int(match[1]) for key in self.tensors if (match := _layer.match(key))}
        if found != set(range(len(found))) or not found:
            raise self.damaged("layers are missing")
        return len(found)

    def image(self, patches: str, places: tuple[int, ...], width: int) -> dict[str, int]:
        """Side of a patch and of the picture, from a kernel and the number of positions."""
        patch = self.of(patches, width, 3, None, None)[2]
        grid = math.isqrt(places[-2] - 1)
        if grid < 1 or grid * grid + 1 != places[-2]:
            raise ValueError(
                f"file_name is {self.file_name}, whose {places[-2]} positions are not those of a "
                "square picture and a class token: download another encoder"
            )
        return {"patch_size": patch, "image_size": grid * patch}

    def heads(self, width: int) -> int:
        """Of the attention, which no tensor tells."""
        heads = _heads.get(width, width // _head_width)
        if width % _head_width and width not in _heads:
            raise ValueError(
                f"file_name is {self.file_name}, whose width of {width} is no multiple of "
                f"{_head_width}, so its heads are not known: download another encoder"
            )
        return heads

    def damaged(self, what: str) -> ValueError:
        """An error that says what is wrong."""
        return ValueError(
            f"file_name is {self.file_name}, which is damaged: {what}; download it again"
        )


def _clip_config(shapes: _Shapes) -> _Config:
    root = "vision_model.embeddings"
    (width,) = shapes.of(f"{root}.class_embedding", None)
    places = shapes.of(f"{root}.position_embedding.weight", None, width)
    layers = shapes.layers()
    inner, _ = shapes.of("vision_model.encoder.layers.0.mlp.fc1.weight", None, width)
    config = {
        "hidden_size": width,
        "intermediate_size": inner,
        "model_type": "clip_vision_model",
        "num_attention_heads": shapes.heads(width),
        "num_channels": 3,
        "num_hidden_layers": layers,
        **shapes.image(f"{root}.patch_embedding.weight", places, width),
    }
    if "visual_projection.weight" in shapes.tensors:
        config["projection_dim"] = shapes.of("visual_projection.weight", None, width)[0]
    return config


def _dino_config(shapes: _Shapes) -> _Config:
    width = shapes.of("embeddings.cls_token", 1, 1, None)[2]
    places = shapes.of("embeddings.position_embeddings", 1, None, width)
    config = {
        "hidden_size": width,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "layer_norm_eps": 1e-6,
        "model_type": "dinov2",
        "num_attention_heads": shapes.heads(width),
        "num_channels": 3,
        "num_hidden_layers": shapes.layers(),
        "use_swiglu_ffn": "encoder.layer.0.mlp.weights_in.weight" in shapes.tensors,
        **shapes.image("embeddings.patch_embeddings.projection.weight", places, width),
    }
    if "embeddings.mask_token" not in shapes.tensors:
        config["use_mask_token"] = False
    return config


def _activation(chosen: str, told: str | None, width: int) -> str:
    if chosen != "auto":
        return chosen
    if told in ACTIVATIONS[1:]:
        return told
    return "gelu" if width >= min(_heads) else "quick_gelu"


def _needed(config: _Config, tensors: _Tensors, file_name: str) -> list[str]:
    """The names of all tensors of a model, each of which the file has in the model's shape."""
    kind = comfy.clip_vision.IMAGE_ENCODERS[config["model_type"]]
    # Nothing is allocated, whatever sizes a file speaks of.
    with torch.device("meta"):
        model = kind(config, torch.float32, torch.device("meta"), comfy.ops.manual_cast)
    shapes = _Shapes(tensors, file_name)
    expected: _Tensors = model.state_dict()
    for name, tensor in expected.items():
        shapes.of(name, *tensor.shape)
    return list(expected)


def _is_stock(config: _Config) -> bool:
    """Whether ComfyUI's own loader builds the same."""
    root = Path(comfy.clip_vision.__file__).parent
    files = [*root.glob("clip_vision_config_*.json"), *root.glob("image_encoders/dino2_*.json")]
    known = [json.loads(file.read_text("utf-8")) for file in files]
    return any(all(stock.get(key) == value for key, value in config.items()) for stock in known)


def _built(config: _Config, tensors: _Tensors, file_name: str) -> ClipVisionModel:
    for name, tensor in tensors.items():
        if not tensor_files.is_finite(tensor):
            raise ValueError(
                f"file_name is {file_name}, which is damaged: {name} holds values that are not "
                "finite numbers; download it again"
            )
    encoder = ClipVisionModel(config)
    encoder.load_sd(tensors)
    return encoder
