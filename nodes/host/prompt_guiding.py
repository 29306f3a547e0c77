"""A guider for any sampler that lets the source picture arise beside the target."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from torch import Tensor

from . import families, layouts, values
from .guiding import (
    Branch,
    Conditioning,
    GuidanceMode,
    Options,
    SourceTargetGuider,
    pair_key,
)
from .inversion import Trajectory
from .null_text import NullTextTrajectory, warn_of_other_guidance, with_text
from .prompt_to_prompt import BlendHeat, BlendSettings, blend_key, heat_key

log = logging.getLogger(__name__)


class PairGuider(SourceTargetGuider):
    """Evaluates the source at its own latent wherever a sampler asks for the target.

    The source starts from the same noise as the target and goes on by Euler steps between the
    noise levels that the sampler asks for, which is DDIM for models that predict noise; or it is
    held on a trajectory, which then says where it leads. So Prompt-to-Prompt and Inject Values work
    with every sampler of SamplerCustomAdvanced.
    """

    def __init__(
        self,
        model: ModelPatcher,
        source: Conditioning,
        target: Conditioning,
        negative: Conditioning | None = None,
        source_guidance: float = 1.0,
        target_guidance: float = 1.0,
        mode: GuidanceMode = "auto",
        way: Trajectory | None = None,
    ):
        """
        Args:
            model: any family of the tap's table.
            source, target, negative, source_guidance, target_guidance, mode: see
                `SourceTargetGuider`.
            way: the source's latents. One of null-text inversion gives the negative prompt, too.

        Raises:
            ValueError: a family whose attention is not known, a trajectory of another family, or
                guidance other than 1 without a negative prompt.
        """
        if way is not None:
            way.require_family(families.name(model))
        if isinstance(way, NullTextTrajectory):
            negative = way.negative
            warn_of_other_guidance(way, target_guidance)
        guidances = (source_guidance, target_guidance)
        super().__init__(model, source, target, negative, *guidances, mode)
        self.way = way
        if way is not None:
            # Where the source leads is known, so only its attention is needed.
            self.source_cfg = 1.0
        if values.sharing_key not in model.model_options["transformer_options"]:
            log.warning(
                "Pinpoint: the model of this guider takes nothing from the source prompt, so it "
                "samples the target prompt alone: put Prompt-to-Prompt before it"
            )

    def require_model(self, model: ModelPatcher) -> None:
        """Any model will do whose attention is known."""
        layouts.layout_of(model)

    def inner_sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        device: torch.device,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As ComfyUI's; outside of a local blend a source that was inverted keeps its bits."""
        if self.way is not None:
            self.way.require_fitting(latent_image, families.name(self.model_patcher))
        options = self.model_options["transformer_options"]
        self.source_path = _SourcePath(self.way)
        heat = BlendHeat(tuple(latent_image.shape[2:]))
        self.blend = _LocalBlend(options.get(blend_key), heat)
        given = (noise, latent_image, device, sampler, sigmas, *args)
        edited = super().inner_sample(*given, **kwargs)
        area = self.blend.area if self.blend.held_last else None
        # With noise left in either, the two do not belong into one latent.
        if self.way is None or area is None or max(self.way.sigmas[-1], float(sigmas[-1])) > 0:
            return edited
        return torch.where(area, edited, self._source(latent_image))

    def _source(self, latent_image: Tensor) -> Tensor:
        """The inverted picture as on the LATENT wire, bit by bit if that is what was connected."""
        assert self.way is not None
        into, out = self.inner_model.process_latent_in, self.inner_model.process_latent_out
        source = out(self.way.source.to(latent_image))
        return torch.where(source == out(into(latent_image)), latent_image, source)

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: Options = {},  # noqa: B006
        seed: int | None = None,
    ) -> Tensor:
        """Denoised latents of the target."""
        if self.way is None and self.same_prompts:
            # The source is the target then, whatever the sampler does.
            self._evaluated_source = True
            return super().predict_noise(x, timestep, model_options, seed)
        sigma = float(timestep[0])
        source = self.source_path.at(x, sigma)
        both = torch.cat([self.blend.held(x, source, sigma), source])
        options = create_model_options_clone(model_options)
        options[pair_key] = True
        options["transformer_options"][heat_key] = self.blend.heat
        target, source = (
            super().predict_noise(both, torch.cat([timestep, timestep]), options, seed).chunk(2)
        )
        source = self.source_path.denoised(source, sigma)
        self.blend.look()
        return self.blend.held(target, source, sigma)

    def _branch(
        self, conds: dict[str, list[dict]], x: Tensor, sigma: Tensor, cfg: float, options: Options
    ) -> Branch:
        branch = super()._branch(conds, x, sigma, cfg, options)
        if isinstance(self.way, NullTextTrajectory) and branch.negative is not None:
            embedding = self.way.unconditional(float(sigma[0]))
            branch.negative = [with_text(entry, embedding) for entry in branch.negative]
        return branch


class _SourcePath:
    """The source's latent at each noise level that a sampler asks for."""

    def __init__(self, way: Trajectory | None):
        self.way = way
        self.last: tuple[float, Tensor, Tensor] | None = None
        """Noise level, latent and denoised latent of the last call."""
        self.latent: Tensor | None = None

    def at(self, x: Tensor, sigma: float) -> Tensor:
        """The source's latent; where it has none yet, the target's, which starts there too."""
        if self.way is not None:
            source = self.way.at(sigma, x)
            if self.last is None:
                _warn_of_other_noise(x, source)
        elif self.last is None:
            source = x.clone()
        else:
            before, latent, denoised = self.last
            # As ComfyUI's Euler sampler computes it.
            source = latent + (latent - denoised) / before * (sigma - before)
        self.latent = source
        return source

    def denoised(self, predicted: Tensor, sigma: float) -> Tensor:
        """The clean latent for which the source heads at the noise level that was asked for."""
        if self.way is not None:
            predicted = _leading(self.way, sigma, predicted)
        assert self.latent is not None
        self.last = (sigma, self.latent, predicted)
        return predicted


def _leading(way: Trajectory, sigma: float, like: Tensor) -> Tensor:
    """The clean latent for which a trajectory heads, on a straight line, where it is at `sigma`."""
    starts = enumerate(pairwise(way.sigmas))
    steps = [(i, high, low) for i, (high, low) in starts if low < sigma * (1 - 1e-6)]
    index, high, low = steps[0] if steps else (len(way.sigmas) - 2, *way.sigmas[-2:])
    first, second = way.latents[index].to(like), way.latents[index + 1].to(like)
    return second - (first - second) * (low / (high - low)) if low else second


def _warn_of_other_noise(x: Tensor, source: Tensor) -> None:
    if (x - source).abs().mean() > 0.1 * source.std():
        log.warning(
            "Pinpoint: the sampler starts far from the trajectory, so the target will be another "
            "picture: connect the noise of the inversion, its latent and its sigmas"
        )


class _LocalBlend:
    """Puts the source back outside the area of some words.

    As published but for the time: the published program blends the latent after each step. Here
    what the model sees and says is blended, so that any sampler follows; its last step ends at the
    source there.
    """

    def __init__(self, settings: BlendSettings | None, heat: BlendHeat):
        self.settings = settings
        self.heat = heat if settings is not None else None
        self.area: Tensor | None = None
        self.held_last = False
        """Whether it acted on what was given to it last."""

    def look(self) -> None:
        """Renew the area by all attention that was read so far."""
        if self.settings is not None and self.heat is not None:
            self.area = self.heat.area(self.settings.threshold)

    def held(self, target: Tensor, source: Tensor, sigma: float) -> Tensor:
        """The target inside the area, the source elsewhere."""
        self.held_last = False
        if self.settings is None or self.area is None or sigma > self.settings.first_sigma:
            return target
        self.held_last = True
        return torch.where(self.area, target, source)
