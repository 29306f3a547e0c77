"""FocusFlow's phase 1: where do the velocities of two prompts differ?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels import flow, masks
from . import families
from .guiding import Conditioning, SourceTargetGuider

weakest_signal = 1e-3
"""A velocity difference below this share of the velocity itself is rounding, not an edit."""


@dataclass(frozen=True)
class HeatSettings:
    """How the heat map is made.

    Attributes:
        noise_level: sigma at which both prompts are compared, in (0, 1).
        samples: noises averaged.
        low, high: quantiles that the map is clipped to.
        seed: noise k is drawn with seed + 100 k; one noise serves all pictures of a batch.
    """

    noise_level: float = 0.75
    samples: int = 10
    low: float = 0.01
    high: float = 0.99
    seed: int = 0


class VelocityProbe(comfy.samplers.Sampler):
    """A sampler that measures instead of sampling, so that ComfyUI loads and patches the model.

    `heat` holds the result, (B, H, W) in [0, 1] at the latent's size.
    """

    def __init__(self, settings: HeatSettings):
        self.settings = settings
        self.heat: Tensor | None = None

    def sample(
        self,
        model_wrap: SourceTargetGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        settings, sigma = self.settings, self.settings.noise_level
        total = difference = speed = 0.0
        done = 0
        while done < settings.samples:
            comfy.model_management.throw_exception_if_processing_interrupted()
            draws = model_wrap.draws_per_call(latent_image, settings.samples - done)
            seeds = [settings.seed + 100 * (done + k) for k in range(draws)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            noises = flow.draw_noise((draws, *latent_image.shape[1:]), generators, latent_image)
            x = torch.cat([flow.noised(latent_image, n, sigma) for n in noises.split(1)])
            target, source = model_wrap.velocities(x, x, sigma, extra_args)
            parts = masks.velocity_difference(target, source).unflatten(0, (draws, -1))
            total = total + parts.sum(0)
            difference += float((target - source).abs().sum())
            speed += float(source.abs().sum())
            done += draws
            if callback is not None:
                callback(done - 1, latent_image, latent_image, settings.samples)
        _require_signal(difference, speed)
        self.heat = masks.normalized(total / settings.samples, settings.low, settings.high)
        return latent_image


def _require_signal(difference: float, speed: float) -> None:
    share = difference / max(speed, 1e-12)
    if not torch.isfinite(torch.tensor(share)):
        raise ValueError(
            "model returned values that are not finite: check the checkpoint, the latent and the "
            "prompts for NaN"
        )
    if share < weakest_signal:
        raise ValueError(
            f"source and target prompts move the picture alike (their velocities differ by "
            f"{share:.1e} of their size), so there is nothing to locate: change the target prompt "
            "or connect a mask"
        )


def probing_guider(
    model: ModelPatcher,
    source: Conditioning,
    target: Conditioning,
    guidance: float,
    *,
    remembers: bool = False,
) -> SourceTargetGuider:
    """A guider for `velocity_heat` that spends nothing on classifier-free guidance.

    Both prompts are evaluated at the same latent, so the unconditional velocities cancel in
    `v_target - v_source = w (c_target - c_source)`, and the map is normalised: the scale w cannot
    change it. Guidance that is embedded in the model does matter and is passed on.
    """
    scale = guidance if families.has_embedded_guidance(model) else 1.0
    return SourceTargetGuider(model, source, target, None, scale, scale, remembers=remembers)


def velocity_heat(guider: SourceTargetGuider, latent: Tensor, settings: HeatSettings) -> Tensor:
    """Heat map of where two prompts disagree about a picture.

    Args:
        guider: with the same guidance for both prompts.
        latent: (B, C, [T,] H, W) as it comes on a LATENT wire.
        settings: see `HeatSettings`.

    Returns:
        (B, H, W) in [0, 1], on the CPU.

    Raises:
        ValueError: the two prompts give no signal, or the model returns NaN.
    """
    if guider.same_prompts:
        raise ValueError(
            "source and target prompts are the same, so there is nothing to locate: change the "
            "target prompt or connect a mask"
        )
    probe = VelocityProbe(settings)
    sigmas = torch.tensor([settings.noise_level, 0.0])
    progress = comfy.utils.ProgressBar(settings.samples)
    # No preview picture: it would stay on the node and hide the heat map.
    guider.sample(
        torch.zeros_like(latent),
        latent,
        probe,
        sigmas,
        callback=lambda step, *_: progress.update_absolute(step + 1),
        seed=settings.seed,
        disable_pbar=True,
    )
    assert probe.heat is not None
    return probe.heat.cpu()


def rough_picture(patcher: ModelPatcher, latent: Tensor) -> Tensor:
    """The picture in a latent as ComfyUI's fast preview shows it, (B, h, w, 3) in [0, 1]."""
    model = patcher.model
    factors = model.latent_format.latent_rgb_factors
    if factors is None:
        return torch.full((len(latent), *latent.shape[-2:], 3), 0.5)
    bias = model.latent_format.latent_rgb_factors_bias
    flat = model.process_latent_in(latent.float().cpu())
    if model.latent_format.latent_rgb_factors_reshape is not None:
        flat = model.latent_format.latent_rgb_factors_reshape(flat)
    flat = flat[:, :, 0] if flat.ndim == 5 else flat
    weight = torch.tensor(factors).T
    picture = torch.nn.functional.linear(flat.movedim(1, -1), weight, bias and torch.tensor(bias))
    return ((picture + 1) / 2).clamp(0, 1)
