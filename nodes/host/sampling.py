"""Edit samplers for SamplerCustomAdvanced: FlowEdit, FocusFlow, and FocusFlow as published."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...kernels import flow
from . import arguments
from .active_tokens import ActiveSettings, ActiveTokens
from .guiding import SourceTargetGuider

log = logging.getLogger(__name__)

Method = Literal["FocusFlow", "FlowEdit", "FocusFlow as published"]


@dataclass(frozen=True)
class EditSettings:
    """How an edit runs.

    Attributes:
        method: FocusFlow moves only inside the mask; FlowEdit has no mask; "FocusFlow as published"
            blends whole velocities as the authors' code does, for reproduction.
        n_max: steps that are run, counted from the clean end of the schedule; 0 changes nothing.
        n_min: of these, the last ones that sample the target prompt instead of moving the source.
        n_avg: noises averaged in each moving step.
        reanchor: put the source back outside the mask before every moving step, too.
        mask: (B or 1, H, W) in [0, 1], any size, or None for everywhere.
        active: which of the target's tokens are calculated; None for all.
    """

    method: Method = "FocusFlow"
    n_max: int = 24
    n_min: int = 0
    n_avg: int = 1
    reanchor: bool = False
    mask: Tensor | None = None
    active: ActiveSettings | None = None


class EditSampler(comfy.samplers.Sampler):
    """Moves a source latent to a target prompt along the difference of two velocities.

    Only the seed of the connected noise is used: row i of a batch draws from its own generator with
    seed + i, so that a batch equals single runs.
    """

    def __init__(self, settings: EditSettings):
        self.settings = settings

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
        """ComfyUI's sampler interface; returns the edited latent in the model's space."""
        schedule = self._checked_schedule(model_wrap, sigmas, noise)
        mask = self._mask_for(latent_image, denoise_mask)
        run = _Run(model_wrap, self.settings, extra_args, latent_image, mask, sigmas)
        steps = list(enumerate(pairwise(schedule)))
        for index, (sigma, following) in tqdm(steps, disable=disable_pbar):
            comfy.model_management.throw_exception_if_processing_interrupted()
            run.begin(index)
            moving = len(steps) - index > self.settings.n_min
            preview = run.move(sigma, following) if moving else run.resample(sigma, following)
            if callback is not None:
                callback(index, preview, run.latent, len(steps))
        return run.finished()

    def _checked_schedule(
        self, guider: comfy.samplers.CFGGuider, sigmas: Tensor, noise: Tensor
    ) -> list[float]:
        settings, steps = self.settings, len(sigmas) - 1
        if not isinstance(guider, SourceTargetGuider):
            raise ValueError(
                f"guider is a {type(guider).__name__}, which knows one prompt only: connect a "
                "Source/Target Guider"
            )
        if steps < 1:
            raise ValueError(
                f"sigmas have {steps} steps: connect the sigmas of a scheduler with at least one"
            )
        if settings.n_max > steps:
            raise ValueError(
                f"n_max is {settings.n_max}, but the sigmas have only {steps} steps: lower n_max "
                f"to {steps} or raise the scheduler's steps"
            )
        if not noise.any():
            raise ValueError(
                "noise is empty (Disable Noise): connect RandomNoise, an edit needs it"
            )
        schedule = sigmas[steps - settings.n_max :].tolist()
        highest = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
        falling = all(a >= b and a > 0 for a, b in pairwise(schedule))
        if not falling or schedule[0] > max(1.0, highest):
            listed = ", ".join(f"{sigma:.3f}" for sigma in schedule[:4])
            raise ValueError(
                f"sigmas ({listed} ...) do not fall from at most 1 to 0: connect the sigmas of a "
                "scheduler for this model, not flipped ones"
            )
        if settings.n_max == 0:
            log.warning("Pinpoint: n_max is 0, so no step is run and nothing will change")
        still = settings.n_min == 0 and settings.method != "FocusFlow as published"
        if guider.same_prompts and still:
            log.warning(
                "Pinpoint: source and target prompts and guidances are the same, so nothing will "
                "change: change the target prompt"
            )
        return schedule

    def _mask_for(self, latent: Tensor, denoise_mask: Tensor | None) -> Tensor | None:
        """The mask widget's and the latent's noise mask multiplied, at the latent's size."""
        mask = None
        if self.settings.mask is not None:
            mask = arguments.mask_on_latent(self.settings.mask, latent)
        if denoise_mask is not None:
            own = denoise_mask[:, :1].to(latent)
            mask = own if mask is None else mask * own
        if mask is not None and self.settings.method == "FlowEdit":
            log.warning("Pinpoint: FlowEdit has no mask, so the mask is not used: choose FocusFlow")
            return None
        published = self.settings.method == "FocusFlow as published"
        if mask is not None and not mask.any() and not published:
            log.warning("Pinpoint: the mask is empty, so nothing will change")
        return mask


class _Run:
    """State of one edit: the source, how far it has moved, and the generators of its rows."""

    def __init__(
        self,
        guider: SourceTargetGuider,
        settings: EditSettings,
        extra_args: dict[str, Any],
        source: Tensor,
        mask: Tensor | None,
        sigmas: Tensor,
    ):
        self.guider, self.settings, self.extra_args = guider, settings, extra_args
        self.source, self.sigmas = source, sigmas
        self.mask = source.new_ones(()) if mask is None else mask
        seed = extra_args.get("seed") or 0
        self.generators = [
            torch.Generator().manual_seed((seed + row) % 2**64) for row in range(len(source))
        ]
        self.delta = torch.zeros_like(source)
        self.anchor_noise: Tensor | None = None
        self.latent = source
        self.draws = guider.draws_per_call(source, settings.n_avg)
        self.active = self._active_tokens()

    def begin(self, step: int) -> None:
        """A step begins."""
        if self.active is not None:
            self.active.step, self.active.part = step, 0

    def move(self, sigma: float, following: float) -> Tensor:
        """One step of the noise-free phase; returns the predicted clean picture for the preview."""
        mask = self._mask_at(sigma)
        if self.settings.reanchor:
            self.delta = mask * self.delta
        if self.settings.method == "FocusFlow as published":
            return self._move_blended(sigma, following, mask)
        self.delta, difference = flow.moved(
            self.delta, self._velocities(sigma), mask, following - sigma, self.settings.n_avg
        )
        self.latent = self.source + self.delta
        return self.latent - following * (mask * difference)

    def _move_blended(self, sigma: float, following: float, mask: Tensor) -> Tensor:
        blend_target, blend_source = torch.zeros_like(self.delta), torch.zeros_like(self.delta)
        for target, source, draws in self._velocities(sigma):
            blend_target += target.unflatten(0, (draws, -1)).sum(0) / self.settings.n_avg
            blend_source += source.unflatten(0, (draws, -1)).sum(0) / self.settings.n_avg
        step = following - sigma
        start = self.source + self.delta
        self.latent = flow.blended_step(start, blend_target, blend_source, mask, step)
        self.delta = self.latent - self.source
        return self.latent

    def _velocities(self, sigma: float) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Both velocities over `n_avg` noises, as many noises in one call as memory allows."""
        left = self.settings.n_avg
        while left:
            draws = min(self.draws, left)
            noises = [self._noise() for _ in range(draws)]
            source = torch.cat([flow.noised(self.source, noise, sigma) for noise in noises])
            target = source + self.delta.repeat(draws, *[1] * (source.ndim - 1))
            both = self.guider.velocities(
                target, source, sigma, self.extra_args, active=self.active
            )
            yield *both, draws
            left -= draws
            if self.active is not None:
                self.active.part += 1

    def _active_tokens(self) -> ActiveTokens | None:
        settings = self.settings
        if settings.active is None or settings.n_max == settings.n_min:
            return None
        if settings.method != "FocusFlow":
            log.warning(
                f"Pinpoint: {settings.method} moves the whole picture, so all is calculated"
            )
            return None
        rows = len(self.source) * settings.n_avg
        return self.guider.active_tokens(
            settings.active, self.mask, rows, self.extra_args["model_options"]
        )

    def resample(self, sigma: float, following: float) -> Tensor:
        """One step of plain sampling with the target prompt, the source anchored outside the mask.

        FocusFlow as published samples both prompts at the same latent and anchors nothing.
        """
        mask, step = self._mask_at(sigma), following - sigma
        # What it keeps is not needed any more.
        self.active = None
        if self.anchor_noise is None:
            self.anchor_noise = self._noise()
            self.latent = flow.noised(self.source, self.anchor_noise, sigma) + self.delta
        if self.settings.method == "FocusFlow as published":
            both = self.guider.velocities(
                self.latent, self.latent, sigma, self.extra_args, source_stays=False
            )
            self.latent = flow.blended_step(self.latent, *both, mask, step)
            return self.latent
        x = flow.anchored(self.latent, self.source, self.anchor_noise, mask, sigma)
        velocity = self.guider.target_velocity(x, sigma, self.extra_args)
        self.latent = x + step * velocity
        return x - sigma * velocity

    def finished(self) -> Tensor:
        """The edited latent; exactly the source where the mask is 0."""
        if self.anchor_noise is None or self.settings.method == "FocusFlow as published":
            return self.latent
        return torch.where(self.mask > 0, self.source.lerp(self.latent, self.mask), self.source)

    def _noise(self) -> Tensor:
        return flow.draw_noise(tuple(self.source.shape), self.generators, self.source)

    def _mask_at(self, sigma: float) -> Tensor:
        """The mask at this step; Differential Diffusion, when applied to the model, shapes it."""
        shaping = self.extra_args["model_options"].get("denoise_mask_function")
        if shaping is None or self.mask.ndim == 0:
            return self.mask
        sigma_rows = self.source.new_full((len(self.source),), sigma)
        shaped = shaping(
            sigma_rows, self.mask, extra_options={"model": self.guider, "sigmas": self.sigmas}
        )
        # At its last noise level it takes in all of the picture, with some schedulers.
        return shaped * (self.mask > 0)
