"""Tiny models of families whose sizes ComfyUI's loaders fix: its own classes, built by hand.

Needs `inprocess.start`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tiny


class Recipe(NamedTuple):
    """How a model is built: a class of `comfy.supported_models`, and its network's settings."""

    family: str
    settings: dict[str, Any]
    seed: int


_CHROMA = dict(
    image_model="chroma",
    in_channels=4 * tiny.latent_channels,
    out_channels=4 * tiny.latent_channels,
    context_in_dim=tiny.text_width,
    hidden_size=tiny.hidden,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[8, 28, 28],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    in_dim=64,
    out_dim=tiny.hidden,
    hidden_dim=64,
    n_layers=1,
    txt_ids_dims=[],
    vec_in_dim=None,
)

_QWEN = dict(
    image_model="qwen_image",
    in_channels=4 * tiny.latent_channels,
    out_channels=tiny.latent_channels,
    num_layers=2,
    attention_head_dim=64,
    num_attention_heads=2,
    joint_attention_dim=tiny.text_width,
    axes_dims_rope=(8, 28, 28),
)

_LUMINA = dict(
    image_model="lumina2",
    patch_size=2,
    in_channels=tiny.latent_channels,
    dim=128,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=4,
    n_kv_heads=2,
    multiple_of=32,
    cap_feat_dim=tiny.text_width,
    axes_dims=[8, 12, 12],
    qk_norm=True,
)

# Its modulation is never narrower than 256.
_ZIMAGE = {
    **_LUMINA,
    **dict(dim=256, n_kv_heads=4, axes_dims=[16, 24, 24]),
    **dict(z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32),
}

# Transformers on two levels, two in a row on the second, as SDXL has them.
_SDXL = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=64,
    num_res_blocks=[1, 1, 1],
    channel_mult=[1, 1, 2],
    transformer_depth=[0, 1, 2],
    transformer_depth_middle=2,
    transformer_depth_output=[0, 0, 1, 1, 2, 2],
    use_spatial_transformer=True,
    use_linear_in_transformer=True,
    context_dim=tiny.text_width,
    num_classes="sequential",
    # Six numbers about sizes, 256 wide each, follow the pooled prompt.
    adm_in_channels=tiny.pooled_width + 6 * 256,
)

# All transformers that SD1.5 and SDXL have, in their places, a tenth as wide. The first one's text
# is as wide as in truth.
_SD15_WHOLE = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    context_dim=768,
    adm_in_channels=None,
)
_SDXL_WHOLE = {
    **_SDXL,
    **dict(model_channels=32, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4]),
    **dict(transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10),
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}

RECIPES = {
    "chroma": Recipe("Chroma", _CHROMA, 7),
    "qwen": Recipe("QwenImage", _QWEN, 8),
    "qwen_edit": Recipe("QwenImage", {**_QWEN, "default_ref_method": "index_timestep_zero"}, 8),
    "lumina2": Recipe("Lumina2", _LUMINA, 9),
    "zimage": Recipe("ZImage", _ZIMAGE, 10),
    # Without refiners no token knows of another before the first block.
    "lumina2_bare": Recipe("Lumina2", {**_LUMINA, "n_refiner_layers": 0}, 9),
    "zimage_bare": Recipe("ZImage", {**_ZIMAGE, "n_refiner_layers": 0}, 10),
    "sdxl": Recipe("SDXL", _SDXL, 11),
    "sd15_whole": Recipe("SD15", _SD15_WHOLE, 12),
    "sdxl_whole": Recipe("SDXL", _SDXL_WHOLE, 13),
}


def model(name: str) -> Any:
    """A ModelPatcher, as a stock loader would give it."""
    import torch

    with torch.inference_mode():
        patcher = _patcher(name)
    # As loaders do, so that it can be loaded a second time.
    patcher.cached_patcher_init = (_patcher, (name,))
    return patcher


def _patcher(name: str, disable_dynamic: bool = False) -> Any:  # noqa: ARG001
    import torch
    from comfy import model_management, model_patcher, supported_models

    family, settings, seed = RECIPES[name]
    config = getattr(supported_models, family)(settings)
    config.set_inference_dtype(torch.float32, None)
    made = config.get_model({})
    made.diffusion_model.load_state_dict(tiny.drawn(made.diffusion_model, seed))
    return model_patcher.CoreModelPatcher(
        made,
        load_device=model_management.get_torch_device(),
        offload_device=model_management.unet_offload_device(),
    )
