"""Null-text formulas against the published code's, which keeps latents on DDIM's own scale."""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SIGMAS = [0.3, 0.8, 1.7, 6.0, 14.6]


@pytest.fixture(scope="module")
def null_text(pack: ModuleType) -> ModuleType:
    return pack.kernels.null_text


def latent(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)


def predicted_noise(x: Tensor, sigma: float) -> Tensor:
    """What a model may say of a latent on DDIM's scale."""
    return torch.sin(2 * x) + x.flip(-1) / (1 + sigma)


def denoiser(x: Tensor, sigma: float) -> Tensor:
    """The same model as ComfyUI shows it."""
    return x - sigma * predicted_noise(x / math.hypot(sigma, 1), sigma)


def alpha(sigma: float) -> float:
    """DDIM's cumulative product at a noise level."""
    return 1 / (1 + sigma**2)


def ddim(x: Tensor, noise: Tensor, sigma: float, following: float) -> Tensor:
    """`prev_step` and `next_step` of the published code, on DDIM's scale."""
    start, end = alpha(sigma), alpha(following)
    clean = (x - (1 - start) ** 0.5 * noise) / start**0.5
    return end**0.5 * clean + (1 - end) ** 0.5 * noise


def test_steps_are_ddims(null_text: ModuleType) -> None:
    x = latent(1)
    for sigma, following in pairwise(SIGMAS[::-1]):
        scaled = x * alpha(sigma) ** 0.5
        expected = ddim(scaled, predicted_noise(scaled, sigma), sigma, following)
        found = null_text.step(x, denoiser(x, sigma), sigma, following)
        torch.testing.assert_close(found * alpha(following) ** 0.5, expected)


def test_inversion_steps_are_the_published_ones(null_text: ModuleType) -> None:
    """The code asks about the latent at hand and the noise level where the step ends."""
    x = latent(2)
    scaled = x * alpha(SIGMAS[0]) ** 0.5
    for sigma, following in pairwise(SIGMAS):
        scaled = ddim(scaled, predicted_noise(scaled, following), sigma, following)
        x = null_text.inversion_step(denoiser, x, sigma, following)
        torch.testing.assert_close(x * alpha(following) ** 0.5, scaled)


def test_an_inversion_may_begin_at_the_picture(null_text: ModuleType) -> None:
    x = latent(3)
    found = null_text.inversion_step(denoiser, x, 0.0, 0.4)
    torch.testing.assert_close(found, x + 0.4 * predicted_noise(x, 0.4))


def test_the_deviation_of_clean_latents_counts(null_text: ModuleType) -> None:
    shown: list[Any] = []

    def look(x: Tensor, sigma: float) -> Tensor:
        shown.append((x, sigma))
        return x

    x = latent(4)
    null_text.inversion_step(look, x, 1.2, 3.5, deviation=0.5)
    torch.testing.assert_close(shown[0][0], x * (3.5**2 + 0.25) ** 0.5 / 1.3)
    assert shown[0][1] == 3.5


def test_a_step_undoes_the_inversion_where_noise_is_constant(null_text: ModuleType) -> None:
    noise, x = latent(5), latent(6)
    there = null_text.inversion_step(lambda y, s: y - s * noise, x, 0.5, 2.0)
    back = null_text.step(there, there - 2.0 * noise, 2.0, 0.5)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 14.6])
def test_distances_are_mean_squares_on_ddims_scale(null_text: ModuleType, sigma: float) -> None:
    a, b = latent(7), latent(8)
    found = null_text.distances(a, b, sigma)
    scale = alpha(sigma) ** 0.5
    expected = [
        torch.nn.functional.mse_loss(x * scale, y * scale) for x, y in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("step", [0, 1, 25, 49])
def test_settings_at_fifty_steps_are_the_published_ones(null_text: ModuleType, step: int) -> None:
    assert null_text.learning_rate(0.01, step / 50) == pytest.approx(0.01 * (1 - step / 100))
    assert null_text.tolerance(1.0, step / 50) == pytest.approx(1e-5 + step * 2e-5)
    assert null_text.tolerance(0.0, step / 50) == 0
