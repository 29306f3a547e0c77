"""The Invert node's work: run an inversion, keep its way and its values, measure the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from . import families, recording
from .guiding import Conditioning
from .inversion import (
    FlowSampler,
    InvertedNoise,
    SolverSettings,
    Trajectory,
    calls_per_step,
    checked_schedule,
    leading_noise,
    lowest_sigma,
)
from .progress import show


@dataclass(frozen=True)
class Inversion:
    """One inversion: model, prompt and solver.

    Raises:
        ValueError: not a flow model, or guidance other than 1 without a negative prompt.
    """

    model: ModelPatcher
    source: Conditioning
    negative: Conditioning | None
    guidance: float
    settings: SolverSettings
    seed: int

    def __post_init__(self) -> None:
        families.require_flow(self.model)
        embedded = families.has_embedded_guidance(self.model)
        if self.guidance != 1 and not embedded and self.negative is None:
            raise ValueError(
                f"negative is not connected, but guidance is {self.guidance:g}: connect a negative "
                "prompt (empty text will do) or set guidance to 1"
            )

    def run(self, latent: Tensor, sigmas: Tensor, measured: bool) -> tuple[Trajectory, str]:
        """Invert a latent from the wire; returns the way in the model's space and a report.

        Raises:
            ValueError: sigmas that do not rise or fall, or a recording above its limit.
        """
        rising = sorted(checked_schedule(sigmas))
        model = self.model.clone()
        options = model.model_options["transformer_options"]
        values, report = self._recording(options, latent, rising)
        if report:
            show(report[0])
        if values is not None:
            options[recording.recording_key] = values
        states: list[Tensor] = []
        total = (len(rising) - 1) * (2 if measured else 1)
        progress = _progress(model, total)
        sampler = FlowSampler(self.settings, lambda _sigma, x: states.append(x.cpu()))
        self._sample(model, sampler, torch.zeros_like(latent), latent, rising, progress)
        clean = states[0] / (1 - rising[0])
        noise = leading_noise(states[-1], clean, rising[-1])
        trajectory = Trajectory(
            rising[::-1], torch.stack(states[::-1]), noise, families.name(model), values
        )
        calls = (len(rising) - 1) * calls_per_step[self.settings.method]
        calls += self.settings.method == "FireFlow"
        report = [f"{len(rising) - 1} steps, {calls} model calls", *report]
        if measured:
            after = _progress(model, total, offset=len(rising) - 1)
            report.append(self._round_trip(trajectory, latent, after))
        text = "\n".join(report)
        show(text)
        return trajectory, text

    def _recording(
        self, options: dict[str, Any], latent: Tensor, rising: list[float]
    ) -> tuple[recording.Recording | None, list[str]]:
        settings: recording.RecordSettings | None = options.get(recording.recorder_key)
        if settings is None:
            return None, []
        text = self._text_tokens(latent) if settings.tokens == "image and text" else 0
        levels = evaluated_sigmas(self.settings.method, rising)
        cost = settings.cost(self.model, latent, text, levels, rising)
        settings.require_room(cost)
        if cost == 0:
            raise ValueError(
                "Record Values has no step of this schedule between its start and end: widen them"
            )
        return recording.Recording(settings), [f"recorded values take {cost / 1e6:.1f} MB"]

    def _text_tokens(self, latent: Tensor) -> int:
        """Tokens of the prompt as the model gets them; Flux.2 lengthens short prompts."""
        conds = comfy.sampler_helpers.convert_cond(self.source[:1])
        prepared = comfy.samplers.encode_model_conds(
            self.model.model.extra_conds, conds, latent, latent.device, "positive"
        )
        return prepared[0]["model_conds"]["c_crossattn"].cond.shape[1]

    def _sample(
        self,
        model: ModelPatcher,
        sampler: comfy.samplers.Sampler,
        noise: Tensor,
        latent: Tensor,
        schedule: list[float],
        progress: Callable[..., None],
    ) -> Tensor:
        guider = comfy.samplers.CFGGuider(model)
        source = self.source
        if families.has_embedded_guidance(model):
            source = node_helpers.conditioning_set_values(source, {"guidance": self.guidance})
        negative = {} if self.negative is None else {"negative": self.negative}
        guider.inner_set_conds({"positive": source, **negative})
        guider.set_cfg(1.0 if families.has_embedded_guidance(model) else self.guidance)
        return guider.sample(
            noise,
            latent,
            sampler,
            torch.tensor(schedule),
            callback=progress,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )

    def _round_trip(
        self, trajectory: Trajectory, latent: Tensor, progress: Callable[..., None]
    ) -> str:
        plain = replace(self.settings, eta=0.0)
        model = self.model.clone()
        back = self._sample(
            model, FlowSampler(plain), trajectory.noise, latent, trajectory.sigmas, progress
        )
        error = (back - latent).float().pow(2).mean().sqrt()
        share = float(error / latent.float().pow(2).mean().sqrt().clamp(min=1e-12))
        decibels = -20 * math.log10(max(share, 1e-9))
        return f"round trip: {100 * share:.2f} % of the latent's size ({decibels:.1f} dB)"


def evaluated_sigmas(method: str, schedule: list[float]) -> list[float]:
    """The noise levels that the model is told when a solver runs a schedule, each of them once."""
    firsts = schedule[:-1]
    middles = [(a + b) / 2 for a, b in pairwise(schedule)]
    if method == "RF-Solver":
        levels = firsts + middles
    else:
        levels = firsts[:1] + middles if method == "FireFlow" else firsts
    return sorted({max(level, lowest_sigma) for level in levels})


def noise_of(trajectory: Trajectory) -> InvertedNoise:
    """The NOISE that leads back along a trajectory."""
    return InvertedNoise(trajectory.noise)


def as_latent(model: ModelPatcher, noise: Tensor, latent: dict[str, Any]) -> dict[str, Any]:
    """Noise in the model's space as a LATENT, with all but the mask of the one inverted."""
    wire = {**latent, "samples": model.model.process_latent_out(noise)}
    wire.pop("noise_mask", None)
    return wire


def noise_from(model: ModelPatcher, samples: Tensor) -> InvertedNoise:
    """A latent from the wire as NOISE."""
    return InvertedNoise(model.model.process_latent_in(samples.float()))


def _progress(model: ModelPatcher, total: int, offset: int = 0) -> Callable[..., None]:
    """A sampler's callback that previews the picture and counts on from an offset."""
    preview = latent_preview.prepare_callback(model, total)
    return lambda step, denoised, x, _total: preview(step + offset, denoised, x, total)
