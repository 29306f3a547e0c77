"""Tiny models of true architectures with fixed random weights, in the formats of stock loaders.

Weights are scaled by their fan-in, so that prompt, noise and sigma all matter to the output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

text_width, pooled_width = 64, 32
"""Of the conditionings that these models take."""
hidden = 128
"""Width of the tiny SD3 and Flux."""
latent_channels = 16
"""Of all models here but SD1.5, which has 4, and Flux.2, which has 128."""

Weights = dict[str, Tensor]


class Maker:
    """Collects the parameters of a model, drawn from one seed."""

    def __init__(self, seed: int):
        self.weights: Weights = {}
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, deviation: float) -> None:
        """A parameter with normally distributed values."""
        self.weights[name] = torch.randn(shape, generator=self._generator) * deviation

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        """Weight and bias of a linear layer that keeps its input's deviation."""
        self.normal(f"{name}.weight", outputs, inputs, deviation=inputs**-0.5)
        self.normal(f"{name}.bias", outputs, deviation=0.02)

    def ones(self, *names: str, size: int) -> None:
        """The scales of normalisation layers."""
        self.weights |= {name: torch.ones(size) for name in names}


def sd3(*, pooled: bool = True, normalised: bool = False, dual: Iterable[int] = ()) -> Weights:
    """An SD3 transformer with two blocks, which for ComfyUI goes with two heads of 64.

    Args:
        pooled: whether it reads the pooled prompt (`y_embedder`).
        normalised: query and key normalisation, as in SD3.5.
        dual: blocks with a second, image-only attention, as in SD3.5-medium.
    """
    make, depth = Maker(3), 2
    make.normal("x_embedder.proj.weight", hidden, latent_channels, 2, 2, deviation=0.125)
    make.normal("x_embedder.proj.bias", hidden, deviation=0.02)
    make.linear("t_embedder.mlp.0", hidden, 256)
    make.linear("t_embedder.mlp.2", hidden, hidden)
    if pooled:
        make.linear("y_embedder.mlp.0", hidden, pooled_width)
        make.linear("y_embedder.mlp.2", hidden, hidden)
    make.linear("context_embedder", hidden, text_width)
    make.normal("pos_embed", 1, 16 * 16, hidden, deviation=0.5)
    for block in range(depth):
        for stream in ("context_block", "x_block"):
            _sd3_stream(
                make,
                f"joint_blocks.{block}.{stream}.",
                normalised,
                dual=stream == "x_block" and block in dual,
                last=stream == "context_block" and block == depth - 1,
            )
    make.linear("final_layer.linear", 2 * 2 * latent_channels, hidden)
    make.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return make.weights


def _sd3_stream(make: Maker, name: str, normalised: bool, *, dual: bool, last: bool) -> None:
    modulations = 2 if last else 9 if dual else 6
    make.linear(f"{name}adaLN_modulation.1", modulations * hidden, hidden)
    for attention in ("attn", "attn2") if dual else ("attn",):
        make.linear(f"{name}{attention}.qkv", 3 * hidden, hidden)
        if normalised:
            norms = (f"{name}{attention}.ln_{which}.weight" for which in "qk")
            make.ones(*norms, size=64)
        if not last:
            make.linear(f"{name}{attention}.proj", hidden, hidden)
    if not last:
        make.linear(f"{name}mlp.fc1", 4 * hidden, hidden)
        make.linear(f"{name}mlp.fc2", hidden, 4 * hidden)


def flux(*, guidance: bool = True) -> Weights:
    """A Flux transformer with one double and one single block; without guidance it is schnell."""
    make = Maker(1)
    make.linear("img_in", hidden, 4 * latent_channels)
    make.linear("txt_in", hidden, text_width)
    embedders = {"time_in": 256, "vector_in": pooled_width, "guidance_in": 256}
    if not guidance:
        del embedders["guidance_in"]
    for name, width in embedders.items():
        make.linear(f"{name}.in_layer", hidden, width)
        make.linear(f"{name}.out_layer", hidden, hidden)
    for stream in ("double_blocks.0.img_", "double_blocks.0.txt_"):
        make.linear(f"{stream}mod.lin", 6 * hidden, hidden)
        make.linear(f"{stream}attn.qkv", 3 * hidden, hidden)
        make.linear(f"{stream}attn.proj", hidden, hidden)
        make.linear(f"{stream}mlp.0", 4 * hidden, hidden)
        make.linear(f"{stream}mlp.2", hidden, 4 * hidden)
        _flux_norms(make, f"{stream}attn.norm.")
    make.linear("single_blocks.0.linear1", 7 * hidden, hidden)
    make.linear("single_blocks.0.linear2", hidden, 5 * hidden)
    make.linear("single_blocks.0.modulation.lin", 3 * hidden, hidden)
    _flux_norms(make, "single_blocks.0.norm.")
    make.linear("final_layer.linear", 4 * latent_channels, hidden)
    make.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return make.weights


def _flux_norms(make: Maker, name: str) -> None:
    make.ones(f"{name}query_norm.scale", f"{name}key_norm.scale", size=128)


def sd15() -> Weights:
    """The smallest UNet that ComfyUI takes for SD1.5: one level and no middle, 19 M in fp16."""
    model = unet(
        num_res_blocks=[1],
        channel_mult=[1],
        transformer_depth=[1],
        transformer_depth_output=[1, 1],
        transformer_depth_middle=-2,
        context_dim=768,
        num_heads=8,
    )
    return {name: tensor.half() for name, tensor in drawn(model, seed=15).items()}


def unet(**settings: Any) -> nn.Module:
    """A UNet of ComfyUI's with 4 latent channels and 320 at its first level; shapes only."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init

    with torch.device("meta"):
        return UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            use_spatial_transformer=True,
            operations=disable_weight_init,
            **settings,
        )


def wan(model_type: str = "t2v", **settings: Any) -> Weights:
    """A Wan video transformer with two blocks; its latents are 5-D.

    Args:
        model_type: "t2v", or "i2v" for one that also attends to CLIP's view of a picture.
        settings: of ComfyUI's class, in place of those here.
    """
    from comfy.ldm.wan.model import WanModel
    from comfy.ops import disable_weight_init

    sizes = dict(dim=128, ffn_dim=256, num_heads=1, num_layers=2)
    sizes |= dict(in_dim=latent_channels, out_dim=latent_channels, text_dim=text_width)
    with torch.device("meta"):
        model = WanModel(
            model_type=model_type,
            cross_attn_norm=True,
            operations=disable_weight_init,
            **{**sizes, **settings},
        )
    return drawn(model, seed=5)


def flux2() -> Weights:
    """A Flux.2 transformer: 128 latent channels at a sixteenth of the picture's size."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init

    with torch.device("meta"):
        model = Flux(
            in_channels=128,
            out_channels=128,
            vec_in_dim=None,
            context_in_dim=text_width,
            hidden_size=hidden,
            mlp_ratio=3.0,
            num_heads=1,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[32, 32, 32, 32],
            theta=2000,
            patch_size=1,
            qkv_bias=False,
            guidance_embed=True,
            txt_ids_dims=[3],
            global_modulation=True,
            mlp_silu_act=True,
            ops_bias=False,
            default_ref_method="index",
            ref_index_scale=10.0,
            operations=disable_weight_init,
        )
    return drawn(model, seed=2)


def drawn(model: nn.Module, seed: int) -> Weights:
    """Weights for a model that has shapes only."""
    make = Maker(seed)
    for name, parameter in model.state_dict().items():
        if parameter.ndim < 2:
            make.weights[name] = torch.full(parameter.shape, float(name.endswith("weight")))
        else:
            fan_in = math.prod(parameter.shape[1:])
            make.normal(name, *parameter.shape, deviation=fan_in**-0.5)
    return make.weights


RECIPES: dict[str, Callable[[], Weights]] = {
    "sd3": sd3,
    "sd3_bare": lambda: sd3(pooled=False),
    "sd35": lambda: sd3(normalised=True, dual=(0,)),
    "sd35_large": lambda: sd3(normalised=True),
    "flux": flux,
    "flux2": flux2,
    "schnell": lambda: flux(guidance=False),
    "sd15": sd15,
    "wan": wan,
    "wan_i2v": lambda: wan("i2v", in_dim=36),
    "wan_reference": lambda: wan(in_dim_ref_conv=latent_channels),
}

# Only metadata tells ComfyUI that a Wan model reads text of an unusual width.
WAN = {"config": json.dumps({"transformer": {"text_dim": text_width}})}
METADATA = {name: WAN for name in RECIPES if name.startswith("wan")}


def ensure(name: str, folder: Path) -> str:
    """Write a model into a folder if it is not there yet, and return its file name."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(RECIPES[name](), file, METADATA.get(name))
    return file.name
