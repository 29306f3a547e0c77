"""The SD3 transformer of ComfyUI's files in diffusers' own class, as an independent witness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

POOLED_WIDTH = 2048
HEAD = 64


def load(file: Path) -> Any:
    """A diffusers transformer in float32 with the weights of a file in SD3's key names."""
    from diffusers import SD3Transformer2DModel

    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    hidden, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks."))
    model = SD3Transformer2DModel(
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=depth,
        attention_head_dim=HEAD,
        num_attention_heads=hidden // HEAD,
        joint_attention_dim=weights["context_embedder.weight"].shape[1],
        caption_projection_dim=hidden,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=round(weights["pos_embed"].shape[1] ** 0.5),
        qk_norm="rms_norm",
    )
    model.load_state_dict(converted(weights, depth))
    return model.eval()


def converted(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """From ComfyUI's key names to diffusers', with zeros for the pooled prompt's missing layers."""
    hidden = weights["t_embedder.mlp.2.weight"].shape[0]
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    result = {"pos_embed.pos_embed": weights["pos_embed"]}
    for place, width in ((1, POOLED_WIDTH), (2, hidden)):
        name = f"time_text_embed.text_embedder.linear_{place}"
        result[f"{name}.weight"] = torch.zeros(hidden, width)
        result[f"{name}.bias"] = torch.zeros(hidden)
    for block in range(depth):
        ours, theirs = f"joint_blocks.{block}", f"transformer_blocks.{block}"
        streams = {
            "x_block": ("to_{}", "norm_{}"),
            "context_block": ("add_{}_proj", "norm_added_{}"),
        }
        for stream, (project, norm) in streams.items():
            for kind in ("weight", "bias"):
                parts = weights[f"{ours}.{stream}.attn.qkv.{kind}"].chunk(3)
                for letter, part in zip("qkv", parts, strict=True):
                    result[f"{theirs}.attn.{project.format(letter)}.{kind}"] = part
            for letter in "qk":
                scale = weights[f"{ours}.{stream}.attn.ln_{letter}.weight"]
                result[f"{theirs}.attn.{norm.format(letter)}.weight"] = scale
        names[f"{theirs}.norm1.linear"] = f"{ours}.x_block.adaLN_modulation.1"
        names[f"{theirs}.attn.to_out.0"] = f"{ours}.x_block.attn.proj"
        names[f"{theirs}.ff.net.0.proj"] = f"{ours}.x_block.mlp.fc1"
        names[f"{theirs}.ff.net.2"] = f"{ours}.x_block.mlp.fc2"
        if block < depth - 1:
            names[f"{theirs}.norm1_context.linear"] = f"{ours}.context_block.adaLN_modulation.1"
            names[f"{theirs}.attn.to_add_out"] = f"{ours}.context_block.attn.proj"
            names[f"{theirs}.ff_context.net.0.proj"] = f"{ours}.context_block.mlp.fc1"
            names[f"{theirs}.ff_context.net.2"] = f"{ours}.context_block.mlp.fc2"
    for kind in ("weight", "bias"):
        result |= {f"{new}.{kind}": weights[f"{old}.{kind}"] for new, old in names.items()}
        # diffusers keeps scale before shift in norms without a gate, SD3 shift before scale.
        swapped = {
            "norm_out.linear": "final_layer.adaLN_modulation.1",
            f"transformer_blocks.{depth - 1}.norm1_context.linear": (
                f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"
            ),
        }
        for new, old in swapped.items():
            shift, scale = weights[f"{old}.{kind}"].chunk(2)
            result[f"{new}.{kind}"] = torch.cat([scale, shift])
    return result
