"""SD1.5's and SDXL's UNet in diffusers' own class, as an independent witness."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, dict[str, Any]] = {
    "SD15": dict(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    "SDXL": dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
"""As the published models have them."""
DEPTHS: dict[str, dict[str, Any]] = {
    "SD15": dict(
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        transformer_depth_middle=1,
    ),
    "SDXL": dict(
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4],
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10,
    ),
}
"""The same in ComfyUI's words."""

_place = re.compile(r"(input|middle|output)_blocks?\.(\d+)\.(?:1\.)?transformer_blocks\.(\d+)\..*")


def empty(family: str) -> Any:
    """A model without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**SIZES[family])


def sd15(model: Any) -> Any:
    """A model with the weights of ComfyUI's, a tenth as wide as SD1.5."""
    import comfy.utils
    from diffusers import UNet2DConditionModel

    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    ours = model.model.diffusion_model.state_dict()
    widths = tuple(width // 10 for width in SIZES["SD15"]["block_out_channels"])
    made = UNet2DConditionModel(**{**SIZES["SD15"], "block_out_channels": widths})
    made.load_state_dict(
        {theirs: ours[name].clone() for theirs, name in names.items() if name in ours}
    )
    return made.eval().requires_grad_(False)


def numbers(family: str) -> dict[tuple[str, int, int], int]:
    """Each cross-attention's place in diffusers' list of attentions.

    Returns:
        By kind, index and part, as ComfyUI names blocks.
    """
    import comfy.utils

    names = comfy.utils.unet_to_diffusers(DEPTHS[family])
    found = {}
    for number, name in enumerate(empty(family).attn_processors):
        key = names[name.replace("processor", "to_k.weight")]
        kind, index, part = _place.fullmatch(key).groups()  # type: ignore[union-attr]
        if ".attn2." in key:
            # The middle is one block, whose transformers are its second layer.
            found[kind, 0 if kind == "middle" else int(index), int(part)] = number
    return found


def with_ip_adapters(unet: Any, files: list[dict[str, Tensor]], scales: list[float]) -> None:
    """Let diffusers load IP-Adapter files into its model."""
    split = [
        {
            part: {
                key.removeprefix(f"{part}."): tensor.clone()
                for key, tensor in file.items()
                if key.startswith(f"{part}.")
            }
            for part in ("image_proj", "ip_adapter")
        }
        for file in files
    ]
    # It warns of all that is new in ways of its own.
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    unet._load_ip_adapter_weights(split, low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = list(scales)
