"""Two small image encoders that know portraits, in the formats of DINOv2 and of CLIP's ViT.

What published encoders know of photographs from their pre-training, these know of drawn portraits
from supervision: the low-level one keeps fine geometry in its patch tokens, the high-level one
describes the whole picture in its image embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import weights

side, patch = 112, 14
"""Of the pictures that both read, in pixels."""
grid, width = side // patch, 128
"""Patches in a row, and the width of a token."""

_size = {
    "hidden_size": width,
    "image_size": side,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": patch,
}


@dataclass(frozen=True)
class Encoder:
    """One encoder: where its weights are shipped, and what `ClipVisionModel` builds it from."""

    file: Path
    config: dict[str, Any]


ENCODERS = {
    "low": Encoder(
        weights.low_encoder_file,
        {
            **_size,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "layer_norm_eps": 1e-6,
            "model_type": "dinov2",
            "use_swiglu_ffn": False,
        },
    ),
    "high": Encoder(
        weights.high_encoder_file,
        {
            **_size,
            "hidden_act": "quick_gelu",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "intermediate_size": 4 * width,
            "model_type": "clip_vision_model",
            "projection_dim": width,
        },
    ),
}


def normalised(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 -> what the encoder reads, (B, 3, 112, 112)."""
    from comfy.clip_model import clip_preprocess

    mean, std = encoder.config["image_mean"], encoder.config["image_std"]
    read: Tensor = clip_preprocess(images.movedim(1, -1), side, mean, std)
    return read


def resized(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, 112, 112) uint8, to which both encoders' preparation rounds."""
    from comfy.clip_model import clip_preprocess

    parts = [
        clip_preprocess(part.movedim(1, -1).float() / 255, side, [0.0] * 3, [1.0] * 3)
        for part in images.split(100)
    ]
    return torch.cat([(part * 255).round().byte() for part in parts])


def build(encoder: Encoder) -> nn.Module:
    """ComfyUI's model with freshly drawn weights, in float32, differentiable."""
    import comfy.clip_vision
    import comfy.ops

    kind = comfy.clip_vision.IMAGE_ENCODERS[encoder.config["model_type"]]
    operations = comfy.ops.disable_weight_init
    model: nn.Module = kind(encoder.config, torch.float32, torch.device("cpu"), operations)
    for name, parameter in model.named_parameters():
        _draw(name, parameter)
        # DINOv2's mask token has a part in pre-training only.
        parameter.requires_grad_("mask_token" not in name)
    if encoder.config["model_type"] == "clip_vision_model":
        for layer in model.vision_model.encoder.layers:
            layer.forward = partial(_layer_out_of_place, layer)
    return model


@torch.no_grad()
def _draw(name: str, parameter: Tensor) -> None:
    if parameter.ndim > 1 and "token" not in name and "position" not in name:
        nn.init.xavier_uniform_(parameter)
    elif name.endswith("lambda1") or ("norm" in name and name.endswith("weight")):
        nn.init.ones_(parameter)
    else:
        nn.init.zeros_(parameter)


def _layer_out_of_place(layer: nn.Module, x: Tensor, mask: Tensor | None, attention: Any) -> Tensor:
    """CLIP's layer; ComfyUI's own adds in place, which cannot be differentiated."""
    x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
    return x + layer.mlp(layer.layer_norm2(x))


@torch.no_grad()
def set_embeddings(encoder: Encoder, model: nn.Module, images: Tensor) -> None:
    """Set a new model's embeddings: a patch to its principal components, a place to waves.

    From ordinary initialisation a transformer takes long to see more of a patch than its colour.

    Args:
        encoder: of the model.
        model: changed in place.
        images: (N, 3, 112, 112), as `normalised` gives them, N in the hundreds.
    """
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    deviation = values.flip(0)[:width].clamp(min=0).sqrt()
    # Weak components are lifted, but not to where the last ones drown the first.
    gain = 1 / (deviation + 0.05 * deviation[0])
    components = vectors.flip(1).T[:width] * gain[:, None]
    # Rotated at random, so that no channel of the tokens stands for one component alone.
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    kernel = turn @ components
    places = torch.cat([torch.zeros(1, width), _waves() - (kernel @ mean).float()])
    shaped = kernel.float().view(width, 3, patch, patch)
    if encoder.config["model_type"] == "dinov2":
        model.embeddings.patch_embeddings.projection.weight.copy_(shaped)
        model.embeddings.position_embeddings.copy_(places[None])
    else:
        model.vision_model.embeddings.patch_embedding.weight.copy_(shaped)
        model.vision_model.embeddings.position_embedding.weight.copy_(places)


def _waves() -> Tensor:
    """Sines and cosines of a patch's row and column, (64, 128)."""
    frequencies = math.pi / grid * torch.arange(1, width // 4 + 1) / 2
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return 0.5 * torch.cat([rows, columns], 2).flatten(0, 1)
