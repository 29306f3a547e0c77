"""Rectified flow: noising, velocities, and the steps of FlowEdit and FocusFlow.

Sigma runs from 1 (noise) to 0 (image). On the straight path `z = (1 - sigma) * x0 + sigma * noise`
the velocity is `dz/dsigma = noise - x0`.

An edit is carried as its displacement `delta = z - x0` from the source latent instead of as the
latent itself. Where nothing moves, delta stays exactly zero and the source survives bit for bit.

Sources: FlowEdit (Kulikov et al., ICCV 2025, algorithm 1); FocusFlow (Jalalbaim, 2026).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import bodies


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The point at `sigma` on the straight path from a clean latent to noise."""
    return (1 - sigma) * clean + sigma * noise


def velocity(latent: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """Velocity from what a sampler sees: a latent at `sigma` > 0 and its predicted clean latent."""
    return (latent - denoised) / sigma


def masked_delta_step(delta: Tensor, difference: Tensor, mask: Tensor, step: float) -> Tensor:
    """FocusFlow's repaired step: move only inside the mask.

    Args:
        delta: displacement from the source latent, any shape.
        difference: target velocity minus source velocity, mean over noises.
        mask: edit mask in [0, 1], broadcastable to `delta`; 1 everywhere gives FlowEdit.
        step: next sigma minus this sigma (negative).
    """
    return delta + step * (mask * difference)


def moved(
    delta: Tensor,
    velocities: Iterable[tuple[Tensor, Tensor, int]],
    mask: Tensor,
    step: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    """FocusFlow's repaired step from the velocities of several noises.

    Where the mean difference or the mask is 0 and the other finite, delta stays as it is.

    Args:
        delta: displacement from the source latent, (B, C, ..., H, W).
        velocities: target's and source's, (draws * B, C, ..., H, W), and draws, for some of the
            noises at a time; they are taken one after the other, as they may be computed then.
        mask: edit mask in [0, 1], broadcastable to `delta`.
        step: next sigma minus this sigma (negative).
        count: of all noises.

    Returns:
        The next delta, and the mean difference of velocities.
    """
    if bodies.triton_runs(delta, mask):
        from .triton_bodies import flow as triton

        return triton.moved(delta, velocities, mask, step, count)
    difference = torch.zeros_like(delta)
    for target, source, draws in velocities:
        parts = (target - source).unflatten(0, (draws, -1))
        difference += parts.sum(0) / count
    return masked_delta_step(delta, difference, mask, step), difference


def blended_step(
    latent: Tensor, target: Tensor, source: Tensor, mask: Tensor, step: float
) -> Tensor:
    """FocusFlow's published step: target velocity inside the mask, source velocity outside.

    In the noise-free phase this integrates a whole velocity on a variable that holds no noise, so
    identical prompts do not return the source. Kept for reproduction.
    """
    return latent + step * (mask * target + (1 - mask) * source)


def anchored(latent: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """Put the source, noised to `sigma` with one fixed noise, back outside the mask."""
    return mask * latent + (1 - mask) * noised(clean, noise, sigma)


def fused(latent: Tensor, inverted: Tensor, mask: Tensor, strength: float) -> Tensor:
    """Draw a latent to an inverted one outside the mask: exactly either at weight 0 and 1.

    Flux-Sculptor's S2D-EC, structure phase (reconstructed: `M z + (1 - M) z_inverted`).
    """
    weight = (strength * (1 - mask)).to(latent).expand_as(latent)
    return torch.lerp(latent, inverted, weight)


def draw_noise(shape: tuple[int, ...], generators: list[torch.Generator], like: Tensor) -> Tensor:
    """Normal noise of `shape`, row i from generator i, drawn on the CPU in fp32.

    Drawing row by row makes row i of a batch the same as a single run with row i's generator.
    """
    rows = [torch.randn(shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).to(device=like.device, dtype=like.dtype)
