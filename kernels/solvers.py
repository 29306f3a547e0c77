"""Solvers of a rectified flow's equation dx/dsigma = v(x, sigma), in either direction.

With falling sigmas they sample, with rising sigmas they invert a picture to noise.

Sources: RF-Solver (Wang et al., 2024; algebraically the explicit midpoint rule), FireFlow (Deng et
al., 2024), RF-Inversion (Rout et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(x, sigma) to dx/dsigma = noise - image."""
Trend = Literal["constant", "rising", "falling"]


class Solver(Protocol):
    """Takes one step after the other; a run needs a solver of its own."""

    def step(
        self, velocity: Velocity, x: Tensor, sigma: float, following: float
    ) -> tuple[Tensor, Tensor]:
        """From `x` at `sigma` to `following`: the next latent, and the velocity that led there."""
        ...


class Euler:
    """One evaluation a step, error of first order."""

    def step(
        self, velocity: Velocity, x: Tensor, sigma: float, following: float
    ) -> tuple[Tensor, Tensor]:
        """See `Solver`."""
        v = velocity(x, sigma)
        return x + (following - sigma) * v, v


class RFSolver:
    """Two evaluations a step, error of second order.

    RF-Solver's expansion `x + h v1 + h^2/2 (v2 - v1)/(h/2)` is `x + h v2`, the midpoint rule.
    """

    def step(
        self, velocity: Velocity, x: Tensor, sigma: float, following: float
    ) -> tuple[Tensor, Tensor]:
        """See `Solver`."""
        half = (following - sigma) / 2
        v = velocity(x + half * velocity(x, sigma), sigma + half)
        return x + (following - sigma) * v, v


class FireFlow:
    """The midpoint rule with the last step's middle velocity in place of a first evaluation.

    N steps cost N + 1 evaluations.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def step(
        self, velocity: Velocity, x: Tensor, sigma: float, following: float
    ) -> tuple[Tensor, Tensor]:
        """See `Solver`."""
        half = (following - sigma) / 2
        first = velocity(x, sigma) if self._last is None else self._last
        self._last = velocity(x + half * first, sigma + half)
        return x + (following - sigma) * self._last, self._last


def towards_noise(velocity: Tensor, x: Tensor, noise: Tensor, sigma: float, pull: float) -> Tensor:
    """RF-Inversion's velocity on the way to noise: drawn to a fixed noise by `pull` (gamma).

    `sigma` < 1. With pull 1 the path is straight and ends at the noise.
    """
    return velocity + pull * ((noise - x) / (1 - sigma) - velocity)


def towards_image(velocity: Tensor, x: Tensor, image: Tensor, sigma: float, pull: float) -> Tensor:
    """RF-Inversion's velocity on the way back: drawn to the source image by `pull` (eta).

    `sigma` > 0. With pull 1 on all steps the result is the image.
    """
    return velocity + pull * ((x - image) / sigma - velocity)


def strength_at(progress: float, strength: float, start: float, end: float, trend: Trend) -> float:
    """A strength that acts in a part of a run.

    Args:
        progress: where the run is, 0 at its start and 1 at its end.
        strength: its greatest value.
        start, end: it acts where start <= progress < end.
        trend: constant, rising from 0 to `strength`, or falling from `strength` to 0.
    """
    if not start <= progress < end:
        return 0.0
    part = (progress - start) / (end - start)
    return strength * {"constant": 1.0, "rising": part, "falling": 1 - part}[trend]
