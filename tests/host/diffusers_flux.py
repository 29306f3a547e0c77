"""The Flux transformer of ComfyUI's files in diffusers' own class, as an independent witness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

POOLED_WIDTH = 768
HEAD = 128

# diffusers' names of a block's parts, and ComfyUI's.
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "proj_out": "final_layer.linear",
}


def load(file: Path) -> Any:
    """A diffusers transformer in float32 with the weights of a file in Flux's key names."""
    from diffusers import FluxTransformer2DModel

    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    hidden, channels = weights["img_in.weight"].shape
    doubles, singles = (_depth(weights, kind) for kind in ("double_blocks", "single_blocks"))
    model = FluxTransformer2DModel(
        in_channels=channels,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=HEAD,
        num_attention_heads=hidden // HEAD,
        joint_attention_dim=weights["txt_in.weight"].shape[1],
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )
    model.load_state_dict(converted(weights, doubles, singles))
    return model.eval()


def _depth(weights: dict[str, Tensor], kind: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith(f"{kind}."))


def converted(weights: dict[str, Tensor], doubles: int, singles: int) -> dict[str, Tensor]:
    """From ComfyUI's key names to diffusers', with zeros for the pooled prompt's missing layers."""
    hidden = len(weights["img_in.weight"])
    result: dict[str, Tensor] = {}
    for place, width in ((1, POOLED_WIDTH), (2, hidden)):
        name = f"time_text_embed.text_embedder.linear_{place}"
        result |= {
            f"{name}.weight": torch.zeros(hidden, width),
            f"{name}.bias": torch.zeros(hidden),
        }
    names = dict(_WHOLE)
    fused: dict[str, tuple[str, ...]] = {}
    for block in range(doubles):
        ours, theirs = f"double_blocks.{block}", f"transformer_blocks.{block}"
        names |= {f"{theirs}.{new}": f"{ours}.{old}" for new, old in _DOUBLE.items()}
        for stream, project, norm in (
            ("img", "to_{}", "norm_{}"),
            ("txt", "add_{}_proj", "norm_added_{}"),
        ):
            parts = tuple(f"{theirs}.attn.{project.format(letter)}" for letter in "qkv")
            fused[f"{ours}.{stream}_attn.qkv"] = parts
            for letter, word in zip("qk", ("query", "key"), strict=True):
                scale = weights[f"{ours}.{stream}_attn.norm.{word}_norm.weight"]
                result[f"{theirs}.attn.{norm.format(letter)}.weight"] = scale
    for block in range(singles):
        ours, theirs = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        names |= {f"{theirs}.{new}": f"{ours}.{old}" for new, old in _SINGLE.items()}
        parts = tuple(f"{theirs}.attn.to_{letter}" for letter in "qkv")
        fused[f"{ours}.linear1"] = (*parts, f"{theirs}.proj_mlp")
        for letter, word in zip("qk", ("query", "key"), strict=True):
            scale = weights[f"{ours}.norm.{word}_norm.weight"]
            result[f"{theirs}.attn.norm_{letter}.weight"] = scale
    for kind in ("weight", "bias"):
        result |= {f"{new}.{kind}": weights[f"{old}.{kind}"] for new, old in names.items()}
        for old, parts in fused.items():
            tensor = weights[f"{old}.{kind}"]
            # In a single block, what is left after q, k and v is the MLP's.
            sizes = [hidden] * 3 + [len(tensor) - 3 * hidden] * (len(parts) - 3)
            split = tensor.split(sizes)
            result |= {f"{new}.{kind}": t for new, t in zip(parts, split, strict=True)}
        # diffusers keeps scale before shift in norms without a gate, Flux shift before scale.
        shift, scale = weights[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        result[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
    return result


@torch.no_grad()
def velocity(model: Any, x: Tensor, sigma: float, text: Tensor) -> Tensor:
    """Velocity of latents (B, C, H, W) with even sizes, packed as diffusers' Flux pipeline does."""
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    cells = x.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(rows, columns, 3)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    found = model(
        hidden_states=cells.reshape(batch, rows * columns, channels * 4),
        timestep=torch.full((batch,), sigma),
        encoder_hidden_states=text.expand(batch, -1, -1),
        pooled_projections=torch.randn(batch, POOLED_WIDTH),
        img_ids=places.view(-1, 3),
        txt_ids=torch.zeros(text.shape[1], 3),
    ).sample
    unpacked = found.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(x.shape)
