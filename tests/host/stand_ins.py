"""Tiny models with random weights, in files of real models' names that stock loaders take.

They stand in for the weights that the workflows of real models name and that do not ship. Networks
are as narrow and as shallow as ComfyUI's detection allows; text encoders are those of
`small_text_encoders`. Needs `inprocess.start`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from portraits import checkpoint, image_encoders, weights

from . import ip_adapters, small_text_encoders
from .base import link_file
from .prompts import Graph

Weights = dict[str, Tensor]

_sd15_text = 768
"""Width of what SD1.5's text encoder gives."""
SIDE = 96
"""Of the pictures in a shortened workflow."""
_SHORT: dict[str, dict[str, float | str]] = {
    # The least that the node takes.
    "ImageScaleToTotalPixels": {"megapixels": 0.01},
    "BasicScheduler": {"steps": 2},
    "PinpointEditWithWords": {"steps": 3},
    "PinpointStructureDetailEdit": {"steps": 3},
    "PinpointLearnIdentity": {
        "token_steps": 1,
        "steps": 1,
        "batch": 1,
        "attributes": "hair, hat",
        "resolution": 64,
    },
    "PinpointNullTextInversion": {"inner_steps": 1},
    "EmptyLatentImage": {"width": SIDE, "height": SIDE},
    "KSampler": {"steps": 2},
}


def shorten(graph: Graph) -> None:
    """Lower the widgets of a workflow that make it take long."""
    for node in graph.values():
        widgets = _SHORT.get(node["class_type"], {})
        assert widgets.keys() <= node["inputs"].keys(), node["class_type"]
        node["inputs"].update(widgets)


def install(base: Path) -> None:
    """Put the files into a base directory, and what its server needs to load them."""
    node = Path(small_text_encoders.__file__)
    link_file(node, base / "custom_nodes" / node.name)
    for place, make in RECIPES.items():
        file = base / "models" / place
        file.parent.mkdir(exist_ok=True)
        save_file(make(), file)


def _checkpoint(family: str, network: Weights, encoders: Weights, codec: Path) -> Weights:
    """A single file, with the key names that ComfyUI's family of models has in it."""
    from comfy import supported_models

    config = getattr(supported_models, family)({})
    return {
        **config.process_unet_state_dict_for_saving(network),
        **config.process_clip_state_dict_for_saving(encoders),
        **{f"first_stage_model.{key}": tensor for key, tensor in load_file(codec).items()},
    }


def _encoders(*names: str) -> Weights:
    parts = {f"{name}.transformer.": encoder(name) for name in names}
    return {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}


def encoder(name: str) -> Weights:
    """The network of a text encoder: clip_l, clip_g or t5xxl."""
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import sd3_clip

    makers: dict[str, Callable[..., Any]] = {
        "clip_l": sd1_clip.SDClipModel,
        "clip_g": sdxl_clip.SDXLClipG,
        "t5xxl": sd3_clip.T5XXLModel,
    }
    made = makers[name](device="meta", model_options=small_text_encoders.OPTIONS)
    return _drawn(made.transformer, seed=list(makers).index(name))


def sd15() -> Weights:
    """SD1.5's UNet with all of its transformers, but all levels as wide as the first."""
    model = tiny.unet(
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 1, 1, 1],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        transformer_depth_middle=1,
        context_dim=_sd15_text,
        num_heads=8,
    )
    return _drawn(model, seed=15)


def ip_adapter(kind: str) -> Weights:
    """An IP-Adapter for `sd15` and the small image encoder: "global" or "plus"."""
    generator = torch.Generator().manual_seed(len(kind))
    seen = image_encoders.width
    shapes = ip_adapters.shapes(kind, [320] * 16, _sd15_text, seen, 128)
    return {
        key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for key, shape in shapes.items()
    }


def sdxl() -> Weights:
    """A UNet of SDXL's smallest relative, KOALA-700M, with all levels as wide as the first."""
    model = tiny.unet(
        num_res_blocks=[1, 1, 1],
        channel_mult=[1, 1, 1],
        transformer_depth=[0, 2, 5],
        transformer_depth_output=[0, 0, 0, 0, 0, 1],
        transformer_depth_middle=-2,
        context_dim=2048,
        num_head_channels=64,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=2816,
    )
    return _drawn(model, seed=16)


def sd35_medium() -> Weights:
    """SD3.5-medium's transformer with two blocks, one of them with a second attention."""
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from comfy.ops import disable_weight_init

    width, context = 2 * 64, 4096
    embedder = {"in_features": context, "out_features": width}
    with torch.device("meta"):
        model = MMDiT(
            input_size=None,
            in_channels=tiny.latent_channels,
            depth=2,
            adm_in_channels=2048,
            context_embedder_config={"target": "torch.nn.Linear", "params": embedder},
            num_patches=16 * 16,
            pos_embed_max_size=16,
            qk_norm="rms",
            x_block_self_attn_layers=[0],
            operations=disable_weight_init,
        )
    return _drawn(model, seed=35)


def flux1_dev() -> Weights:
    """Flux.1-dev's transformer with all its single blocks, but 128 wide."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init

    with torch.device("meta"):
        model = Flux(
            in_channels=tiny.latent_channels,
            out_channels=tiny.latent_channels,
            vec_in_dim=768,
            context_in_dim=4096,
            hidden_size=tiny.hidden,
            mlp_ratio=4.0,
            num_heads=1,
            depth=2,
            depth_single_blocks=38,
            axes_dim=[16, 56, 56],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=True,
            txt_ids_dims=[],
            operations=disable_weight_init,
        )
    return _drawn(model, seed=1)


def _drawn(model: Any, seed: int) -> Weights:
    """As `tiny.drawn`, but every parameter is cut from the same numbers: most are embeddings."""
    generator = torch.Generator().manual_seed(seed)
    # A prime, so that no two rows of a parameter begin at the same number.
    numbers = torch.randn(1_000_003, generator=generator).half()
    made: Weights = {}
    for name, parameter in model.state_dict().items():
        if parameter.ndim < 2:
            made[name] = torch.full(parameter.shape, float(name.endswith("weight"))).half()
        else:
            row = numbers * math.prod(parameter.shape[1:]) ** -0.5
            count = parameter.numel()
            flat = row.repeat(math.ceil(count / len(row)))[:count]
            made[name] = flat.view(parameter.shape).contiguous()
    return made


RECIPES: dict[str, Callable[[], Weights]] = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": lambda: _checkpoint(
        "SD15", sd15(), _encoders("clip_l"), weights.sd15_codec_file
    ),
    "checkpoints/sd_xl_base_1.0.safetensors": lambda: _checkpoint(
        "SDXL", sdxl(), _encoders("clip_l", "clip_g"), weights.sd15_codec_file
    ),
    "checkpoints/sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": lambda: _checkpoint(
        "SD3", sd35_medium(), _encoders("clip_l", "clip_g", "t5xxl"), weights.codec_file
    ),
    "diffusion_models/flux1-dev.safetensors": flux1_dev,
    "text_encoders/clip_l.safetensors": lambda: encoder("clip_l"),
    "text_encoders/t5xxl_fp16.safetensors": lambda: encoder("t5xxl"),
    "vae/ae.safetensors": checkpoint.flux_vae,
    "clip_vision/model.safetensors": lambda: load_file(weights.high_encoder_file),
    "ipadapter/ip-adapter-plus_sd15.safetensors": lambda: ip_adapter("plus"),
    "ipadapter/ip-adapter_sd15.safetensors": lambda: ip_adapter("global"),
}
"""Places below models."""
