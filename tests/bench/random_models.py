"""True architectures with random weights: they cost what trained ones of their size cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def random_sd3(depth: int, side: int) -> Any:
    """An SD3 transformer of `64 * depth` channels for latents up to `side`."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules import mmdit

    text = {"in_features": 4096, "out_features": 64 * depth}
    return _loaded(
        mmdit.OpenAISignatureMMDITWrapper(
            input_size=None,
            patch_size=2,
            in_channels=16,
            depth=depth,
            context_embedder_config={"target": "torch.nn.Linear", "params": text},
            adm_in_channels=2048,
            num_patches=(side // 2) ** 2,
            pos_embed_max_size=side // 2,
            operations=comfy.ops.disable_weight_init,
            dtype=torch.float32,
            device="cpu",
        )
    )


def random_flux(width: int, double: int, single: int) -> Any:
    """A Flux.1-dev transformer with fewer channels and blocks; Flux.1 has 3072, 19 and 38."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    return _loaded(
        Flux(
            in_channels=16,
            out_channels=16,
            vec_in_dim=768,
            context_in_dim=4096,
            hidden_size=width,
            mlp_ratio=4.0,
            num_heads=width // 128,
            depth=double,
            depth_single_blocks=single,
            axes_dim=[16, 56, 56],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=True,
            txt_ids_dims=[],
            operations=comfy.ops.disable_weight_init,
            dtype=torch.float32,
            device="cpu",
        )
    )


def _loaded(made: nn.Module) -> Any:
    import comfy.sd

    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator) * 0.02
        for name, value in made.state_dict().items()
    }
    return comfy.sd.load_diffusion_model_state_dict(weights)


def random_prompt(seed: int, tokens: int = 77, pooled: int = 2048) -> list:
    """A conditioning of SD3's shape; Flux has 768 pooled numbers."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, 4096, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]


def random_latent(side: int) -> Tensor:
    """One latent of 16 channels."""
    return torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(3))
