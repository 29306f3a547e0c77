"""Flux-Sculptor's structure-to-detail control: a sampler that fuses latents with a trajectory.

The fusion of attention values is `values.injecting_model`'s, on the model that it samples with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...kernels import flow, solvers
from . import arguments, families
from .inversion import FlowSampler, SolverSettings, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StructureSettings:
    """How structure is kept.

    Attributes:
        mask: (B or 1, H, W) in [0, 1], any size, 1 = edit.
        start, end: part of the steps in which latents are fused, in [0, 1].
        strength: of the inverted latents outside the mask.
        trend: how the strength changes from start to end.
        anchor: at the end, put the source back outside the mask.
    """

    mask: Tensor
    start: float = 0.0
    end: float = 1.0
    strength: float = 1.0
    trend: solvers.Trend = "constant"
    anchor: bool = True


class SculptSampler(FlowSampler):
    """Samples along falling sigmas while the latents outside a mask follow a trajectory.

    S2D-EC, structure phase: `z <- M z + (1 - M) z_inverted` before the model is called.
    """

    def __init__(self, solver: SolverSettings, structure: StructureSettings, way: Trajectory):
        super().__init__(solver)
        self.structure, self.way = structure, way

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's sampler interface."""
        self.way.require_fitting(latent_image, families.name(model_wrap.model_patcher))
        self.way.require_covering(sigmas.tolist())
        if sigmas[0] < sigmas[-1]:
            raise ValueError(
                "sigmas rise, which would invert: connect the sigmas of a scheduler without "
                "flipping them"
            )
        mask = arguments.mask_on_latent(self.structure.mask, latent_image)
        if self.structure.anchor and not mask.any():
            log.warning("Pinpoint: the mask is empty, so nothing will change")
        given = (model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask)
        sampled = super().sample(*given, disable_pbar)
        if not self.structure.anchor:
            return sampled
        kept = latent_image
        if last := float(sigmas[-1]):
            # ComfyUI hands a latent on as if its noise had been scaled away.
            kept = self.way.at(last, latent_image) / (1 - last)
        return torch.where(mask > 0, kept.lerp(sampled, mask), kept)

    def before_step(self, x: Tensor, index: int, schedule: list[float]) -> Tensor:
        """The latent, outside the mask drawn to the trajectory's at this noise level."""
        settings = self.structure
        strength = solvers.strength_at(
            index / (len(schedule) - 1),
            settings.strength,
            settings.start,
            settings.end,
            settings.trend,
        )
        if strength == 0:
            return x
        mask = arguments.mask_on_latent(self.structure.mask, x)
        return flow.fused(x, self.way.at(schedule[index], x), mask, strength)
