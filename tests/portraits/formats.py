"""The networks of the proving ground: how each format is built, trained and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import codec, text_encoder, weights
from .dataset import people, pictures


@dataclass(frozen=True)
class Process:
    """How pictures become noise, and what of it a network predicts."""

    levels: Callable[[int], Tensor]
    """Noise levels to train at, (count,)."""
    noised: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(latents, noise, levels) to noised latents."""
    goal: Callable[[Tensor, Tensor], Tensor]
    """(latents, noise) to what is predicted."""
    weight: Callable[[Tensor], Tensor]
    """Levels (B,) to the weights of their errors (B,)."""


@dataclass(frozen=True)
class Format:
    """One network format and what its training needs to know."""

    process: Process
    build: Callable[[], nn.Module]
    latents: Callable[[], Callable[[Tensor], Tensor]]
    """Makes what turns pictures (B, 3, 128, 128) in 0..1 into latents."""
    context: Callable[[Tensor], Tensor]
    """Tokens (B, 77) to text (B, 77, 768), as the stock text encoder gives it to this format."""
    predict: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    """(model, noised latents, levels, context) to the process's goal."""
    shipped: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Trained tensors to those of a file that stock loaders recognise."""
    rate: float
    """Peak learning rate."""
    portraits: int
    """Of the training set."""
    batch: int
    """Portraits a step."""


def _flow_noised(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * x + sigma * noise


# Sigma is logit-normal, shifted to noise.
_flow = Process(
    levels=lambda count: torch.sigmoid(torch.randn(count) + 0.5),
    noised=_flow_noised,
    goal=lambda x, noise: noise - x,
    weight=torch.ones_like,
)


@cache
def _signal_shares() -> Tensor:
    """SD1.5's schedule: the share of the picture in the variance at each of 1000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def _diffusion_noised(x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    share = _signal_shares()[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * x + (1 - share).sqrt() * noise


def _velocity_weights(timesteps: Tensor) -> Tensor:
    """Those of v-prediction, up to a limit: in much noise, where colours and places are decided,
    the picture hardly shows in the error of the noise.
    """
    return (1 / _signal_shares()[timesteps]).clamp(max=50)


_diffusion = Process(
    levels=lambda count: torch.randint(0, 1000, (count,)),
    noised=_diffusion_noised,
    goal=lambda _x, noise: noise,
    weight=_velocity_weights,
)


def _projection() -> Callable[[Tensor], Tensor]:
    """What the 16-channel codec's encoder computes, without needing its file."""
    basis = codec.principal_components(pictures(people("train", 1, 512)).float() / 255)
    return lambda images: codec.project(images, basis)


def _trained_encoder() -> Callable[[Tensor], Tensor]:
    """The 4-channel codec's encoder."""
    made = codec.build(codec.sd15_channels)
    made.load_state_dict({k: t.float() for k, t in load_file(weights.sd15_codec_file).items()})
    return made.taesd_encoder.requires_grad_(False)


@cache
def _embeddings() -> tuple[Tensor, Tensor]:
    tokens, places = text_encoder.embeddings()
    return tokens.float(), places.float()


def _embedded(tokens: Tensor) -> Tensor:
    token_table, position_table = _embeddings()
    return token_table[tokens] + position_table


def _normalised(tokens: Tensor) -> Tensor:
    """As other encoders than SD3's give it, which end with CLIP's final normalisation."""
    return F.layer_norm(_embedded(tokens), (text_encoder.width,))


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
        if any(part in name for part in ones) and not name.endswith("bias"):
            nn.init.ones_(parameter)
        elif parameter.ndim < 2 or any(part in name for part in zeroed):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))


def _padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    narrow = tensors["context_embedder.weight"]
    wide = F.pad(narrow, (0, 4096 - narrow.shape[1]))
    return {**tensors, "context_embedder.weight": wide}


def _sd15() -> nn.Module:
    """ComfyUI's UNet of SD1.5, 64 channels wide where stock ones have 320.

    Transformers are on the second level of two and in the middle, on 8 x 8 cells.
    """
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model = UNetModel(
        **sd15_settings,
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        device="cpu",
    )
    last_of_block = ("out_layers.3", "proj_out", "out.2")
    _initialise(model, zeroed=last_of_block, ones=("norm", "in_layers.0", "out_layers.0", "out.0"))
    return model


sd15_settings: dict[str, Any] = {
    "image_size": 32,
    "in_channels": codec.sd15_channels,
    "out_channels": codec.sd15_channels,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": text_encoder.width,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
}
"""Of the UNet, by ComfyUI's names. Its loaders take 320 channels only, so it is built by hand."""


FORMATS = {
    "sd3": Format(
        process=_flow,
        latents=_projection,
        build=_sd3,
        context=_embedded,
        predict=lambda model, x, sigma, text: model(x, sigma * 1000, context=text),
        shipped=_padded,
        rate=1.2e-3,
        portraits=24_000,
        batch=64,
    ),
    "flux": Format(
        process=_flow,
        latents=_projection,
        build=_flux,
        context=_normalised,
        predict=lambda model, x, sigma, text: model(x, sigma, text),
        shipped=dict,
        rate=1e-3,
        portraits=24_000,
        batch=64,
    ),
    "sd15": Format(
        process=_diffusion,
        latents=_trained_encoder,
        build=_sd15,
        context=_normalised,
        predict=lambda model, x, timesteps, text: model(x, timesteps.float(), context=text),
        shipped=dict,
        rate=1e-3,
        # Encoding them takes as long as a tenth of the training.
        portraits=10_000,
        batch=32,
    ),
}
