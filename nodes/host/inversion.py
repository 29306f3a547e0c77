"""From a picture to its noise and back: solver samplers, and the trajectory of an inversion."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...kernels import flow, solvers
from . import families

if TYPE_CHECKING:
    from .recording import Recording

log = logging.getLogger(__name__)

Method = Literal["RF-Solver", "FireFlow", "Euler", "RF-Inversion"]
SOLVERS: dict[str, type[solvers.Solver]] = {
    "RF-Solver": solvers.RFSolver,
    "FireFlow": solvers.FireFlow,
    "Euler": solvers.Euler,
    "RF-Inversion": solvers.Euler,
}
calls_per_step = {"RF-Solver": 2, "FireFlow": 1, "Euler": 1, "RF-Inversion": 1}
"""Model calls; FireFlow makes one more in a run."""

lowest_sigma = 1e-3
"""Noise level that the model is told at sigma 0, where a velocity cannot be read from x0."""
covered = 1e-3
"""How far outside a trajectory a noise level may lie and still be answered by its end."""
flipped_zero = 1e-4
"""What ComfyUI's Flip Sigmas puts in place of sigma 0."""


@dataclass(frozen=True)
class SolverSettings:
    """How a flow is solved.

    Attributes:
        method: the solver.
        gamma: RF-Inversion, on the way to noise: pull towards a noise drawn from the seed.
        eta: RF-Inversion, on the way back: pull towards the picture in the latent.
        eta_start, eta_end: part of the steps in which eta acts, in [0, 1].
        eta_trend: how eta changes there.
    """

    method: Method = "RF-Solver"
    gamma: float = 0.5
    eta: float = 0.9
    eta_start: float = 0.0
    eta_end: float = 0.35
    eta_trend: solvers.Trend = "constant"


class FlowSampler(comfy.samplers.Sampler):
    """Solves a flow in the direction of its sigmas: rising ones invert, falling ones sample.

    An inversion returns the noise that leads back: with it as NOISE and the source as latent, a
    sampler starts exactly where the inversion ended, also below sigma 1.

    Args:
        settings: see `SolverSettings`.
        watch: called with sigma and latent, in the model's space, at the start and after each step.
    """

    def __init__(
        self, settings: SolverSettings, watch: Callable[[float, Tensor], None] | None = None
    ):
        self.settings = settings
        self.watch = watch or (lambda sigma, latent: None)

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's sampler interface."""
        families.require_flow(model_wrap.model_patcher)
        schedule = checked_schedule(sigmas)
        if schedule[0] > schedule[-1]:
            # ComfyUI's own sampler class applies noise masks and scales the noise.
            sampling = comfy.samplers.KSAMPLER(self._sample)
            given = (model_wrap, sigmas, extra_args, callback, noise, latent_image)
            return sampling.sample(*given, denoise_mask, disable_pbar)
        if denoise_mask is not None:
            log.warning("Pinpoint: an inversion runs on the whole picture; its mask is not used")
        velocity = velocity_of(model_wrap, extra_args)
        if self.settings.method == "RF-Inversion":
            velocity = self._drawn_to_noise(velocity, latent_image, extra_args.get("seed") or 0)

        def show(index: int, x: Tensor, denoised: Tensor) -> None:
            if callback is not None:
                callback(index, denoised, x, len(schedule) - 1)

        start = flow.noised(latent_image, noise, schedule[0])
        x = self._solve(velocity, start, schedule, show, disable_pbar)
        return leading_noise(x, latent_image, schedule[-1])

    def _sample(
        self,
        model: comfy.samplers.KSamplerX0Inpaint,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[dict], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """The sampler function of a KSAMPLER."""
        schedule = sigmas.tolist()
        velocity = velocity_of(model, extra_args)
        if self.settings.method == "RF-Inversion":
            velocity = self._drawn_to_image(velocity, model.latent_image, schedule)

        def show(index: int, x: Tensor, denoised: Tensor) -> None:
            if callback is not None:
                callback({"i": index, "x": x, "denoised": denoised, "sigma": sigmas[index]})

        return self._solve(velocity, x, schedule, show, bool(disable))

    def _solve(
        self,
        velocity: solvers.Velocity,
        x: Tensor,
        schedule: list[float],
        show: Callable[[int, Tensor, Tensor], None],
        disable_pbar: bool,
    ) -> Tensor:
        solver = SOLVERS[self.settings.method]()
        self.watch(schedule[0], x)
        for index, (sigma, following) in enumerate(
            tqdm(list(pairwise(schedule)), disable=disable_pbar)
        ):
            comfy.model_management.throw_exception_if_processing_interrupted()
            x = self.before_step(x, index, schedule)
            previous = x
            x, v = solver.step(velocity, previous, sigma, following)
            show(index, x, previous - sigma * v)
            self.watch(following, x)
        return x

    def before_step(self, x: Tensor, index: int, schedule: list[float]) -> Tensor:
        """What a step starts from; subclasses put their fusion here."""
        return x

    def _drawn_to_noise(
        self, velocity: solvers.Velocity, latent: Tensor, seed: int
    ) -> solvers.Velocity:
        generators = [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(len(latent))]
        noise = flow.draw_noise(tuple(latent.shape), generators, latent)
        gamma = self.settings.gamma
        return lambda x, sigma: solvers.towards_noise(velocity(x, sigma), x, noise, sigma, gamma)

    def _drawn_to_image(
        self, velocity: solvers.Velocity, image: Tensor, schedule: list[float]
    ) -> solvers.Velocity:
        settings, steps = self.settings, len(schedule) - 1

        def drawn(x: Tensor, sigma: float) -> Tensor:
            eta = solvers.strength_at(
                schedule.index(sigma) / steps,
                settings.eta,
                settings.eta_start,
                settings.eta_end,
                settings.eta_trend,
            )
            return solvers.towards_image(velocity(x, sigma), x, image, sigma, eta)

        return drawn


def leading_noise(inverted: Tensor, clean: Tensor, sigma: float) -> Tensor:
    """The noise with which the straight path from a clean latent meets an inverted one at sigma."""
    return (inverted - (1 - sigma) * clean) / sigma


def velocity_of(
    model: Callable[..., Tensor], extra_args: dict[str, Any]
) -> Callable[[Tensor, float], Tensor]:
    """The velocity of what a sampler sees as its model; sigma 0 is evaluated just above it."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        told = max(sigma, lowest_sigma)
        return flow.velocity(x, model(x, x.new_full((len(x),), told), **extra_args), told)

    return velocity


def checked_schedule(sigmas: Tensor, highest: float = 1.0) -> list[float]:
    """Sigmas as numbers that rise or fall strictly; flipped ones begin at 0 again.

    Args:
        sigmas: from a scheduler, within [0, `highest`].
        highest: noise level of the model's pure noise.

    Raises:
        ValueError: for anything else.
    """
    schedule = [float(sigma) for sigma in sigmas]
    if len(schedule) < 2:
        raise ValueError(
            f"sigmas have {max(0, len(schedule) - 1)} steps: connect the sigmas of a scheduler "
            "with at least one"
        )
    rising = all(a < b for a, b in pairwise(schedule))
    falling = all(a > b for a, b in pairwise(schedule))
    if not (rising or falling) or min(schedule) < 0 or max(schedule) > highest:
        listed = ", ".join(f"{sigma:.3f}" for sigma in schedule[:4])
        raise ValueError(
            f"sigmas ({listed} ...) do not rise or fall between 0 and {highest:g}: connect the "
            "sigmas of a scheduler for this model"
        )
    return [0.0, *schedule[1:]] if rising and schedule[0] <= flipped_zero else schedule


@dataclass(frozen=True)
class Trajectory:
    """An inverted picture: its latents on the way between noise and image.

    Attributes:
        sigmas: falling, from noise to image.
        latents: (len(sigmas), B, C, [T,] H, W), in the model's space, on the CPU.
        noise: (B, C, [T,] H, W), leads back from the first sigma, in the model's space.
        family: of the model that made it.
        values: recorded attention values, if the model was told to record them.
    """

    sigmas: list[float]
    latents: Tensor
    noise: Tensor
    family: str
    values: Recording | None = None

    @property
    def source(self) -> Tensor:
        """The last latent in the model's space, (B, C, [T,] H, W): the picture, at sigma 0."""
        return self.latents[-1]

    def at(self, sigma: float, like: Tensor) -> Tensor:
        """The latent at a noise level; between two of the schedule's, on a straight line."""
        position = next((i for i, s in enumerate(self.sigmas) if s <= sigma), len(self.sigmas) - 1)
        low = self.sigmas[position]
        ends = position == 0 or sigma < low
        if ends or math.isclose(low, sigma, rel_tol=1e-6, abs_tol=1e-9):
            return self.latents[position].to(like)
        part = (sigma - low) / (self.sigmas[position - 1] - low)
        return self.latents[position].lerp(self.latents[position - 1], part).to(like)

    def require_fitting(self, latent: Tensor, family: str) -> None:
        """Refuse a latent of another size or batch, and another model family.

        Raises:
            ValueError: for either.
        """
        self.require_family(family)
        expected = tuple(self.source.shape)
        if expected != tuple(latent.shape):
            raise ValueError(
                f"trajectory was made from a latent of {_size(expected)}, the sampler has "
                f"{_size(tuple(latent.shape))}: connect the latent that was inverted"
            )

    def require_covering(self, schedule: list[float]) -> None:
        """Refuse to be asked for noise levels that the inversion never had.

        Args:
            schedule: falling sigmas. The picture itself, at sigma 0, is always known.

        Raises:
            ValueError: one is above the first or below the last of the inversion.
        """
        high, low = self.sigmas[0], self.sigmas[-1]
        asked = [sigma for sigma in schedule if sigma > 0]
        if asked[0] > high + covered or asked[-1] < low - covered:
            raise ValueError(
                f"sigmas ask for noise levels from {asked[0]:.3g} to {asked[-1]:.3g}, the "
                f"trajectory has {high:.3g} to {low:.3g}: invert with the sigmas that you sample "
                "with"
            )

    def require_family(self, family: str) -> None:
        """Refuse another model family than the one that made it.

        Raises:
            ValueError: the families differ.
        """
        if family != self.family:
            raise ValueError(
                f"trajectory was made with {self.family}, the model is {family}: invert with the "
                "model that edits"
            )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {'x'.join(map(str, shape[1:]))}"


class InvertedNoise:
    """A NOISE that is not random but leads a sampler back to an inverted picture."""

    seed = 0

    def __init__(self, noise: Tensor):
        self.noise = noise

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """ComfyUI's noise interface; refuses a latent of another size."""
        expected, given = tuple(self.noise.shape), tuple(latent["samples"].shape)
        if expected != given:
            raise ValueError(
                f"noise was inverted from a latent of {_size(expected)}, latent_image is "
                f"{_size(given)}: connect the latent that was inverted"
            )
        return self.noise.clone()
