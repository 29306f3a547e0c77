"""Tiny image encoders with fixed random weights, and the layouts in which files hold them.

Needs `inprocess.start`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

WIDTH, LAYERS = 128, 2
CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": WIDTH,
    "image_size": 64,
    "intermediate_size": 320,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": LAYERS,
    "patch_size": 32,
    "projection_dim": 48,
}
DINO = {
    "hidden_size": WIDTH,
    "image_mean": [0.485, 0.456, 0.406],
    "image_size": 28,
    "image_std": [0.229, 0.224, 0.225],
    "layer_norm_eps": 1e-6,
    "model_type": "dinov2",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": LAYERS,
    "patch_size": 14,
    "use_swiglu_ffn": False,
}


def built(config: dict[str, Any]) -> Any:
    """A stock encoder with random weights, without any loader."""
    from comfy.clip_vision import ClipVisionModel

    encoder, generator = ClipVisionModel(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(drawn + float(parameter.ndim == 1))
    return encoder


def whole_clip(encoder: Any) -> Tensors:
    """A whole CLIP as Hugging Face stores it, with its text encoder and buffers."""
    return {
        **encoder.get_sd(),
        "logit_scale": torch.tensor(4.6),
        "text_model.embeddings.token_embedding.weight": torch.ones(8, 4),
        "text_projection.weight": torch.ones(4, 4),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }


def open_clip(encoder: Any) -> Tensors:
    """A whole CLIP as OpenCLIP stores it."""
    known, root = encoder.get_sd(), "vision_model."
    tensors = {
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.ones(8, 4),
        "transformer.resblocks.0.ln_1.weight": torch.ones(4),
        "visual.class_embedding": known[f"{root}embeddings.class_embedding"],
        "visual.conv1.weight": known[f"{root}embeddings.patch_embedding.weight"],
        "visual.positional_embedding": known[f"{root}embeddings.position_embedding.weight"],
        "visual.proj": known["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        tensors[f"visual.ln_pre.{kind}"] = known[f"{root}pre_layrnorm.{kind}"]
        tensors[f"visual.ln_post.{kind}"] = known[f"{root}post_layernorm.{kind}"]
        for number in range(LAYERS):
            block, layer = (
                f"visual.transformer.resblocks.{number}",
                f"{root}encoder.layers.{number}",
            )
            attention = [known[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(attention)
            for theirs, ours in {
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
                "attn.out_proj": "self_attn.out_proj",
            }.items():
                tensors[f"{block}.{theirs}.{kind}"] = known[f"{layer}.{ours}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def in_classifier(encoder: Any) -> Tensors:
    """A DINOv2 as a part of a classifier, which has no mask token."""
    tensors = {f"dinov2.{name}": tensor for name, tensor in encoder.get_sd().items()}
    del tensors["dinov2.embeddings.mask_token"]
    return {**tensors, "classifier.weight": torch.ones(3, 2 * WIDTH)}
