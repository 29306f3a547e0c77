"""DDIM inversion and what null-text inversion optimises, for latents `x0 + sigma * noise`.

On this scale a DDIM step is an Euler step. DDIM itself keeps its latents at one deviation; the two
scales differ by the factor sqrt(sigma^2 + d^2), with d the deviation of clean latents.

Source: Null-text Inversion (Mokady et al., CVPR 2023) and its code (google/prompt-to-prompt).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
"""(x, sigma) to the predicted clean latent."""


def step(x: Tensor, denoised: Tensor, sigma: float, following: float) -> Tensor:
    """One DDIM step from `sigma` > 0, as ComfyUI's Euler sampler takes it."""
    return x + (x - denoised) / sigma * (following - sigma)


def inversion_step(
    denoiser: Denoiser, x: Tensor, sigma: float, following: float, deviation: float = 1.0
) -> Tensor:
    """One step of DDIM inversion, from `sigma` up to `following`.

    As in the published code, the latent at hand is shown to the model as if it were at the noise
    level where the step ends, which is where the way back asks.

    Args:
        denoiser: the model.
        x: latent at `sigma`, which may be 0.
        sigma, following: rising noise levels.
        deviation: of clean latents, as the model was made for (ComfyUI's `sigma_data`).
    """
    shown = x * (_scale(following, deviation) / _scale(sigma, deviation))
    noise = (shown - denoiser(shown, following)) / following
    return x + (following - sigma) * noise


def distances(reached: Tensor, recorded: Tensor, sigma: float, deviation: float = 1.0) -> Tensor:
    """Mean squared distance (B,) of latents (B, ...) at `sigma`, on DDIM's scale: the loss."""
    difference = (reached - recorded) / _scale(sigma, deviation)
    return difference.square().flatten(1).mean(1)


def learning_rate(first: float, part: float) -> float:
    """Adam's learning rate at a part of the steps in [0, 1); it halves to the end.

    Published: 0.01 * (1 - i / 100) at step i of 50.
    """
    return first * (1 - part / 2)


def tolerance(scale: float, part: float) -> float:
    """The loss at which a step is good enough, at a part of the steps in [0, 1).

    Published: 1e-5 + i * 2e-5 at step i of 50, which is a scale of 1.
    """
    return scale * (1e-5 + 1e-3 * part)


def _scale(sigma: float, deviation: float) -> float:
    return math.hypot(sigma, deviation)
