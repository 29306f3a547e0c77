"""Null-text trajectories, and guiders whose unconditional embedding changes from step to step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from . import arguments, families
from .guiding import Conditioning, Options
from .inversion import Trajectory

log = logging.getLogger(__name__)

text_key = "c_crossattn"
"""Where ComfyUI's prepared conditionings hold what cross-attention reads."""


@dataclass(frozen=True, kw_only=True)
class NullTextTrajectory(Trajectory):
    """An inverted picture with the unconditional embeddings that lead back to it.

    `latents` are those of the DDIM inversion. With the source prompt, the embeddings and the
    inversion's guidance, Euler or DDIM follow `replayed` instead, as close as optimising came.

    Attributes:
        replayed: (len(sigmas), B, C, H, W), in the model's space, on the CPU.
        embeddings: (len(sigmas) - 1, B, tokens, width): each step's, on the CPU.
        negative: the conditioning whose embedding they replace.
        guidance: scale for which they were optimised.
    """

    replayed: Tensor
    embeddings: Tensor
    negative: Conditioning
    guidance: float

    def unconditional(self, sigma: float) -> Tensor:
        """The embedding (B, tokens, width) of the step that starts nearest to a noise level."""
        starts = torch.tensor(self.sigmas[:-1])
        return self.embeddings[(starts / sigma).log().abs().argmin()]


def with_text(entry: dict[str, Any], embedding: Tensor) -> dict[str, Any]:
    """A prepared conditioning whose cross-attention reads another embedding (B, tokens, width).

    It goes where the one was that it replaces, in the same precision: ComfyUI leaves prompts in
    main memory until a call, and puts only those into one call that lie on the same device.
    """
    prepared = entry["model_conds"]
    replaced = prepared[text_key]
    text = type(replaced)(embedding.to(replaced.cond))
    return {**entry, "model_conds": {**prepared, text_key: text}}


def tunable(entry: dict[str, Any], like: Tensor) -> Tensor:
    """A prepared conditioning's embedding (B, tokens, width) for each of B latents, in fp32.

    It lies where the latents do, and with it what gradients are scaled by.
    """
    text = entry["model_conds"][text_key].cond
    return comfy.utils.repeat_to_batch_size(text.to(like.device, torch.float32), len(like))


def warn_of_other_guidance(trajectory: NullTextTrajectory, guidance: float) -> None:
    """Say that embeddings that were tuned for another guidance do not lead back."""
    if not math.isclose(trajectory.guidance, guidance, rel_tol=1e-6):
        log.warning(
            "Pinpoint: the trajectory's embeddings were tuned for guidance %g, the guider has %g, "
            "so the source prompt leads to another picture: set both to the same",
            trajectory.guidance,
            guidance,
        )


class NullTextGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance whose unconditional embedding depends on the noise level."""

    def __init__(
        self,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        guidance: float,
        unconditional: Callable[[float], Tensor],
    ):
        """
        Args:
            model: one with cross-attention.
            positive: the prompt.
            negative: gives all that is not its embedding, such as SDXL's pooled prompt.
            guidance: scale.
            unconditional: a noise level to the embedding (B, tokens, width) there.
        """
        super().__init__(model)
        self.set_conds(positive, negative)
        self.set_cfg(guidance)
        self.unconditional = unconditional

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: Options = {},  # noqa: B006
        seed: int | None = None,
    ) -> Tensor:
        """As ComfyUI's."""
        embedding = self.unconditional(float(timestep[0]))
        # One for each area of the positive prompt.
        negatives = [with_text(entry, embedding) for entry in self.conds["negative"]]
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            negatives,
            self.conds["positive"],
            self.cfg,
            model_options=model_options,
            seed=seed,
        )


class ReplayGuider(NullTextGuider):
    """Replays the embeddings of a trajectory, for any sampler.

    Raises:
        ValueError: the trajectory has no embeddings, or is of another model family.
    """

    def __init__(
        self,
        model: ModelPatcher,
        trajectory: Trajectory,
        positive: Conditioning,
        guidance: float,
    ):
        if not isinstance(trajectory, NullTextTrajectory):
            raise ValueError(
                "trajectory holds no unconditional embeddings: connect the one of Null-Text "
                "Inversion"
            )
        trajectory.require_family(families.name(model))
        warn_of_other_guidance(trajectory, guidance)
        self.trajectory = trajectory
        super().__init__(model, positive, trajectory.negative, guidance, trajectory.unconditional)

    def sample(self, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ComfyUI's, for the latent that was inverted."""
        arguments.latent_samples(self.model_patcher, {"samples": latent_image})
        self.trajectory.require_fitting(latent_image, families.name(self.model_patcher))
        return super().sample(noise, latent_image, *args, **kwargs)
