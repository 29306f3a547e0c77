"""The Null-Text Inversion node's work: to noise by DDIM, and back with optimised embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from torch import Tensor

from ...kernels import null_text
from . import families, gradients
from .guiding import Conditioning, Options
from .inversion import checked_schedule
from .null_text import NullTextGuider, NullTextTrajectory, tunable
from .progress import show


@dataclass(frozen=True)
class OptimiseSettings:
    """How each step's embedding is found.

    Attributes:
        inner_steps: gradient steps at most.
        learning_rate: Adam's at the first step; half of it at the last.
        early_stop: how good is good enough, as a multiple of the published tolerance.
    """

    inner_steps: int = 10
    learning_rate: float = 0.01
    early_stop: float = 1.0


Progress = Callable[[int, Tensor, Tensor], None]
"""Steps that are done, predicted clean latent and latent."""


class DDIMInversion(comfy.samplers.Sampler):
    """Follows rising sigmas from a picture to its noise.

    Attributes:
        latents: at each sigma, in the model's space, on the CPU.
    """

    def __init__(self, progress: Progress):
        self.progress = progress
        self.latents: list[Tensor] = []

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
        deviation = model_wrap.inner_model.model_sampling.sigma_data
        seen = latent_image

        def denoiser(x: Tensor, sigma: float) -> Tensor:
            nonlocal seen
            seen = model_wrap(x, x.new_full((len(x),), sigma), **extra_args)
            return seen

        x = latent_image
        self.latents = [x.cpu()]
        for index, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
            comfy.model_management.throw_exception_if_processing_interrupted()
            x = null_text.inversion_step(denoiser, x, sigma, following, deviation)
            self.latents.append(x.cpu())
            self.progress(index + 1, seen, x)
        return x


class NullTextOptimisation(comfy.samplers.Sampler):
    """Follows falling sigmas with guidance and finds each step's embedding on the way.

    Attributes:
        embedding: the one at work, (B, tokens, width).
        embeddings: those that were found, on the CPU.
        latents: at each sigma, with guidance and these embeddings, on the CPU.
        updates: gradient steps that were taken.
        memory: bytes that gradients needed at most.
    """

    def __init__(self, recorded: list[Tensor], settings: OptimiseSettings, progress: Progress):
        """
        Args:
            recorded: latents of the inversion, from noise to picture.
            settings: see `OptimiseSettings`.
            progress: told after each gradient step; a whole step counts `inner_steps` + 1.
        """
        self.recorded = recorded
        self.settings = settings
        self.progress = progress
        self.embedding = torch.empty(0)
        self.embeddings: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.updates = self.memory = 0

    def sample(
        self,
        model_wrap: NullTextGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's sampler interface."""
        # As ComfyUI's samplers begin, so that they follow to the last bit.
        first = (sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        x = model_wrap.inner_model.model_sampling.noise_scaling(*first)
        self.latents = [x.cpu()]
        self.embedding = tunable(model_wrap.conds["negative"][0], x)
        schedule = sigmas.tolist()
        optimises = self.settings.inner_steps > 0 and not math.isclose(model_wrap.cfg, 1.0)
        for index, (sigma, following) in enumerate(pairwise(schedule)):
            part = index / (len(schedule) - 1)
            step = Step(model_wrap, extra_args, sigma, following)
            target = self.recorded[index + 1].to(x)
            done = index * (self.settings.inner_steps + 1)
            if optimises:
                self._optimise(step, x, target, part, done)
            comfy.model_management.throw_exception_if_processing_interrupted()
            x, denoised = step.taken(x, extra_args["model_options"])
            self.embeddings.append(self.embedding.cpu())
            self.latents.append(x.cpu())
            self.progress(done + self.settings.inner_steps + 1, denoised, x)
        return x

    def _optimise(self, step: Step, x: Tensor, target: Tensor, part: float, done: int) -> None:
        settings = self.settings
        tolerance = null_text.tolerance(settings.early_stop, part)
        # What inference mode made can't be kept for gradients.
        with torch.inference_mode(False), torch.enable_grad():
            x, target = x.clone(), target.clone()
            rows = [row.clone().requires_grad_() for row in self.embedding.split(1)]
            rate = null_text.learning_rate(settings.learning_rate, part)
            optimiser = torch.optim.Adam(rows, rate)
            options = step.with_one_prompt_call()
            for inner in range(settings.inner_steps):
                comfy.model_management.throw_exception_if_processing_interrupted()
                self.embedding = torch.cat(rows)
                with gradients.KeptActivations(x.device) as kept:
                    reached, denoised = step.taken(x, options)
                self.memory = max(self.memory, kept.needed)
                losses = null_text.distances(reached, target, step.following, step.deviation)
                _require_usable(losses, step.sigma)
                unmet = losses.detach() > tolerance
                if not unmet.any():
                    break
                _set_gradients(rows, losses, unmet, x[0].numel())
                optimiser.step()
                self.updates += 1
                self.progress(done + inner + 1, denoised.detach(), reached.detach())
            self.embedding = torch.cat(rows).detach()


@dataclass(frozen=True)
class Step:
    """One guided DDIM step of a guider, with the embedding that it has then."""

    guider: NullTextGuider
    extra_args: dict[str, Any]
    sigma: float
    following: float

    @property
    def deviation(self) -> float:
        """Of clean latents, as the model was made for."""
        return self.guider.inner_model.model_sampling.sigma_data

    def taken(self, x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """The latent that the step leads to, and the clean latent that it heads for."""
        timestep = x.new_full((len(x),), self.sigma)
        denoised = self.guider(x, timestep, options, self.extra_args.get("seed"))
        return null_text.step(x, denoised, self.sigma, self.following), denoised

    def with_one_prompt_call(self) -> Options:
        """Model options with which the prompt is evaluated once and only the embedding anew."""
        options = create_model_options_clone(self.extra_args["model_options"])
        chained = options.pop("sampler_calc_cond_batch_function", None)
        known: list[Tensor] = []

        def evaluated(args: dict[str, Any], conds: list[Any]) -> list[Tensor]:
            if chained is not None:
                return chained({**args, "conds": conds})
            given = (args["input"], args["sigma"], args["model_options"])
            return comfy.samplers.calc_cond_batch(args["model"], conds, *given)

        def evaluate(args: dict[str, Any]) -> list[Tensor]:
            positive, negative = args["conds"]
            if not known:
                with torch.no_grad():
                    known.append(evaluated(args, [positive, None])[0])
            return [known[0], evaluated(args, [None, negative])[1]]

        return {**options, "sampler_calc_cond_batch_function": evaluate}


def _require_usable(losses: Tensor, sigma: float) -> None:
    if not losses.requires_grad:
        raise ValueError(
            "model passes no gradient to the embedding: start ComfyUI without sage or flash "
            "attention, and take out nodes that replace attention"
        )
    if not torch.isfinite(losses).all():
        raise ValueError(
            f"model gives values that are not finite at sigma {sigma:.3f}: load it in another "
            "precision (fp32, or bf16), or lower learning_rate"
        )


def _set_gradients(rows: list[Tensor], losses: Tensor, unmet: Tensor, size: int) -> None:
    """Each picture's gradient to its own embedding; none where the loss is small enough.

    Losses are means over many values: scaled up on the way, their gradients do not vanish in fp16.
    """
    scales = size / losses.detach().sqrt().clamp(min=1e-8)
    found = torch.autograd.grad((losses * scales)[unmet].sum(), rows)
    for row, gradient, scale, open_ in zip(rows, found, scales, unmet, strict=True):
        row.grad = gradient / scale if open_ else None


@dataclass(frozen=True)
class NullTextInversion:
    """One null-text inversion: model, prompts, guidance and how embeddings are optimised.

    Raises:
        ValueError: a model that does not predict noise, a negative prompt of several parts, or a
            ControlNet.
    """

    model: ModelPatcher
    source: Conditioning
    negative: Conditioning
    guidance: float
    settings: OptimiseSettings

    def __post_init__(self) -> None:
        families.require_noise_prediction(self.model)
        if len(self.negative) != 1:
            raise ValueError(
                f"negative has {len(self.negative)} parts: connect a single CLIP Text Encode, "
                "whose embedding can be tuned"
            )
        for name, prompt in (("source", self.source), ("negative", self.negative)):
            if any("control" in entries for _, entries in prompt):
                raise ValueError(
                    f"{name} has a ControlNet, through which nothing can be tuned: invert without "
                    "it and apply it when you sample"
                )

    def run(self, latent: Tensor, sigmas: Tensor) -> tuple[NullTextTrajectory, str]:
        """Invert a latent from the wire; returns the way in the model's space and a report.

        Raises:
            ValueError: sigmas that do not rise or fall, or do not reach the picture, or a model
                that gives no usable gradient.
        """
        sampling = self.model.get_model_object("model_sampling")
        # Published schedules round the highest noise level.
        rising = sorted(checked_schedule(sigmas, 1.01 * float(sampling.sigma_max)))
        if rising[0] > 0:
            raise ValueError(
                f"sigmas end at {rising[0]:.3g}, but the picture is at 0: connect the sigmas of a "
                "scheduler whole, not a part of them"
            )
        tuned = gradients.differentiable(self.model)
        steps = len(rising) - 1
        total = steps * (self.settings.inner_steps + 2)
        preview = latent_preview.prepare_callback(self.model, total)
        plain = comfy.samplers.CFGGuider(self.model)
        plain.set_conds(self.source, self.negative)
        inversion = DDIMInversion(lambda done, x0, x: preview(done - 1, x0, x, total))
        self._sample(plain, inversion, torch.zeros_like(latent), latent, rising)

        def progress(done: int, denoised: Tensor, x: Tensor) -> None:
            preview(steps + done - 1, denoised, x, total)

        falling, recorded = rising[::-1], inversion.latents[::-1]
        noise = self._leading_noise(recorded, falling[0])
        optimisation = NullTextOptimisation(recorded, self.settings, progress)
        guider = NullTextGuider(
            tuned,
            self.source,
            self.negative,
            self.guidance,
            lambda _sigma: optimisation.embedding,
        )
        self._sample(guider, optimisation, noise, latent, falling)
        trajectory = NullTextTrajectory(
            falling,
            torch.stack(recorded),
            noise,
            families.name(self.model),
            replayed=torch.stack(optimisation.latents),
            embeddings=torch.stack(optimisation.embeddings),
            negative=self.negative,
            guidance=self.guidance,
        )
        report = _report(trajectory, optimisation, self.settings)
        show(report)
        return trajectory, report

    def _sample(
        self,
        guider: comfy.samplers.CFGGuider,
        sampler: comfy.samplers.Sampler,
        noise: Tensor,
        latent: Tensor,
        schedule: list[float],
    ) -> None:
        guider.sample(
            noise,
            latent,
            sampler,
            torch.tensor(schedule),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=0,
        )

    def _leading_noise(self, recorded: list[Tensor], sigma: float) -> Tensor:
        """The noise with which ComfyUI's samplers start at the inverted latent."""
        sampling = self.model.get_model_object("model_sampling")
        highest = float(sampling.sigma_max)
        # ComfyUI gives the first latent of a whole schedule the deviation that training gave it.
        whole = sigma > highest or math.isclose(sigma, highest, rel_tol=1e-5)
        size = math.hypot(1, sigma) if whole else sigma
        return (recorded[0] - recorded[-1]) / size


def _report(
    trajectory: NullTextTrajectory, optimisation: NullTextOptimisation, settings: OptimiseSettings
) -> str:
    steps = len(trajectory.sigmas) - 1
    error = (trajectory.replayed[-1] - trajectory.source).square().mean().sqrt()
    share = float(error / trajectory.source.square().mean().sqrt().clamp(min=1e-12))
    decibels = -20 * math.log10(max(share, 1e-9))
    kept = trajectory.embeddings.nbytes + trajectory.latents.nbytes + trajectory.replayed.nbytes
    return "\n".join(
        [
            f"{steps} steps, {optimisation.updates} of {steps * settings.inner_steps} gradient "
            "steps",
            f"round trip: {100 * share:.2f} % of the latent's size ({decibels:.1f} dB)",
            f"gradients took {optimisation.memory / 1e9:.2f} GB, the trajectory takes "
            f"{kept / 1e6:.1f} MB",
        ]
    )
