"""The transformers of the proving ground: how each format is built, conditioned and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import codec, text_encoder


@dataclass(frozen=True)
class Format:
    """One transformer format and what its training needs to know."""

    build: Callable[[], nn.Module]
    context: Callable[[Tensor], Tensor]
    """Tokens (B, 77) to text (B, 77, 768), as the stock text encoder gives it to this format."""
    velocity: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    """(model, x, sigma, context) to the velocity noise - image."""
    shipped: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Trained tensors to those of a file that stock loaders recognise."""
    rate: float
    """Peak learning rate."""


@cache
def _embeddings() -> tuple[Tensor, Tensor]:
    tokens, places = text_encoder.embeddings()
    return tokens.float(), places.float()


def _embedded(tokens: Tensor) -> Tensor:
    token_table, position_table = _embeddings()
    return token_table[tokens] + position_table


def _sd3() -> nn.Module:
    """ComfyUI's SD3 transformer, 3 blocks of 192, for 768-wide text (padded to 4096 when saved)."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules import mmdit

    depth = 3
    hidden = 64 * depth
    model = mmdit.OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=codec.channels,
        depth=depth,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": text_encoder.width, "out_features": hidden},
        },
        num_patches=64,
        pos_embed_max_size=8,
        qk_norm="rms",
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        device="cpu",
    )
    _initialise(model, zeroed=("adaLN", "final_layer.linear"), ones=("ln_",))
    grid = mmdit.get_2d_sincos_pos_embed_torch(hidden, 8, 8, device="cpu")
    model.pos_embed.copy_(grid.view(1, 64, hidden))
    return model


def _flux() -> nn.Module:
    """ComfyUI's Flux transformer, 1 double and 3 single blocks of 256, schnell's kind.

    It has no guidance input, and none for the pooled prompt, which tells only a caption's length.
    """
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(
        in_channels=codec.channels,
        out_channels=codec.channels,
        vec_in_dim=None,
        context_in_dim=text_encoder.width,
        hidden_size=256,
        mlp_ratio=4.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=3,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        device="cpu",
    )
    zeroed = ("mod.lin", "modulation.lin", "adaLN", "final_layer.linear")
    _initialise(model, zeroed=zeroed, ones=("_norm.",))
    _make_trainable(model)
    return model


def _make_trainable(model: nn.Module) -> None:
    """Keep the residual stream in fp32, and its values until the backward pass has read them.

    Flux adds to the stream in place, which would change what the layer norms have saved.
    """
    for layer in (model.img_in, model.txt_in):
        layer.register_forward_hook(lambda _module, _inputs, output: output.float())
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _module, inputs: inputs[0].clone())


def _initialise(model: nn.Module, zeroed: tuple[str, ...], ones: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in ones):
            nn.init.ones_(parameter)
        elif parameter.ndim < 2 or any(part in name for part in zeroed):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))


def _padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    narrow = tensors["context_embedder.weight"]
    wide = F.pad(narrow, (0, 4096 - narrow.shape[1]))
    return {**tensors, "context_embedder.weight": wide}


FORMATS = {
    "sd3": Format(
        build=_sd3,
        context=_embedded,
        velocity=lambda model, x, sigma, text: model(x, sigma * 1000, context=text),
        shipped=_padded,
        rate=1.2e-3,
    ),
    "flux": Format(
        build=_flux,
        # Other than SD3's, the stock encoder ends with the final normalisation.
        context=lambda tokens: F.layer_norm(_embedded(tokens), (text_encoder.width,)),
        velocity=lambda model, x, sigma, text: model(x, sigma, text),
        shipped=dict,
        rate=1e-3,
    ),
}
