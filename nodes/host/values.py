"""Attention values injected: recorded ones, or those of the source's branch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels import attention as attending
from ...kernels import masks, solvers
from . import arguments, families, layouts, tap
from .inversion import Trajectory
from .layouts import Block, Place
from .recording import Recording, is_chosen

sharing_key = "pinpoint_shares_values"
"""In `transformer_options`: set on a model whose target takes attention from the source's branch,
to the warning for samplers that do not evaluate it."""
shared_key = "pinpoint_shared_values"
"""In `transformer_options`: a step's source attention, for targets that run in a later call."""


@dataclass(frozen=True)
class InjectSettings:
    """How values are injected.

    Attributes:
        blocks: transformer blocks.
        first_sigma, last_sigma: noise levels, first > last; it acts above `last_sigma`.
        mask: (B or 1, H, W) in [0, 1], any size, 1 = edit: there the target keeps its own values.
        strength: of the recorded values outside the mask.
        trend: how the strength changes from the first to the last noise level.
    """

    blocks: frozenset[Block]
    first_sigma: float
    last_sigma: float
    mask: Tensor | None = None
    strength: float = 1.0
    trend: solvers.Trend = "constant"


class _Weights:
    """How much of the other picture's values an injection takes; masks are resized once a grid."""

    def __init__(self, settings: InjectSettings):
        self.settings = settings
        self._kept: dict[tuple[int, int], Tensor] = {}

    def of(self, attention: tap.Attention) -> Tensor | None:
        """(B, tokens of the picture) for one branch; None where nothing is taken.

        Raises:
            ValueError: the mask's batch is not the latent's.
        """
        place, call, like = attention.place, attention.call, attention.v
        settings = self.settings
        if not is_chosen(place, settings.blocks):
            return None
        span = max(settings.first_sigma - settings.last_sigma, 1e-9)
        # Noise levels come in float32.
        progress = round((settings.first_sigma - call.sigma) / span, 4)
        strength = solvers.strength_at(progress, settings.strength, 0.0, 1.0, settings.trend)
        if strength == 0:
            return None
        frames, *size = place.grid
        if settings.mask is None:
            return like.new_full((call.rows, math.prod(place.grid)), strength)
        arguments.require_masks_for(settings.mask, call.rows)
        weight = strength * self._outside(settings.mask, (size[0], size[1])).to(like)
        return weight.repeat(call.rows // len(settings.mask), frames)

    def _outside(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        """(B or 1, rows * columns), 1 where the mask is 0."""
        if size not in self._kept:
            resized = masks.resized(mask.float(), *size).clamp(0, 1)
            self._kept[size] = (1 - resized).flatten(1)
        return self._kept[size]


def injecting_model(
    model: ModelPatcher, settings: InjectSettings, trajectory: Trajectory
) -> ModelPatcher:
    """A clone that sees a trajectory's recorded values in place of its own.

    All branches that draw the new picture get them, the negative prompt's too.

    Raises:
        ValueError: no values, those of another family, or not of all that is to be injected.
    """
    recording, weights = _covering(model, trajectory, settings), _Weights(settings)

    def change(attention: tap.Attention) -> Tensor | None:
        weight, call = weights.of(attention), attention.call
        if weight is None:
            return None
        _require_near(trajectory, call.sigma)
        recorded, text = recording.nearest(attention)
        values = attention.v.clone()
        for rows in call.rows_of(lambda uuid, _index: uuid not in call.sources):
            _blend(values[rows], recorded, weight, attention.place, text)
        return values

    return tap.tapped(model, tap.changing(change))


def _covering(model: ModelPatcher, trajectory: Trajectory, settings: InjectSettings) -> Recording:
    """The values of a trajectory, checked against where they are to be injected.

    Half a step of the inversion is forgiven at either end, where the nearest level serves anyway.
    """
    recording = trajectory.values
    if recording is None:
        raise ValueError(
            "trajectory holds no attention values: put Record Values before the model of Invert"
        )
    trajectory.require_family(families.name(model))
    recorded = recording.settings
    missing = settings.blocks - recorded.blocks
    if missing:
        named = layouts.ranges([b for b in layouts.blocks_of(model) if b in missing])
        raise ValueError(
            f"blocks has {named}, of which the trajectory holds no values: give Record Values and "
            "Inject Values the same blocks"
        )
    first, last = recorded.first_sigma, recorded.last_sigma
    steps = list(pairwise(trajectory.sigmas))
    above = next((high - low for high, low in steps if low <= first < high), 0.0)
    below = next((high - low for high, low in steps if low < last <= high), 0.0)
    outside = settings.first_sigma <= last or settings.last_sigma >= first
    if (
        outside
        or settings.first_sigma > first + above / 2
        or settings.last_sigma < last - below / 2
    ):
        raise ValueError(
            "start and end reach outside the recorded part of the steps: give Record Values and "
            "Inject Values the same start and end"
        )
    return recording


def _require_near(trajectory: Trajectory, sigma: float) -> None:
    """Refuse noise levels more than half a step beyond an inversion's ends."""
    sigmas = trajectory.sigmas
    high = sigmas[0] + (sigmas[0] - sigmas[1]) / 2
    low = sigmas[-1] - (sigmas[-2] - sigmas[-1]) / 2
    if not low <= sigma <= high:
        raise ValueError(
            f"sampler asks for attention values at noise level {sigma:.3g}, the trajectory goes "
            f"from {sigmas[0]:.3g} to {sigmas[-1]:.3g}: invert with the sigmas that you sample with"
        )


def _blend(values: Tensor, recorded: Tensor, weight: Tensor, place: Place, text: int) -> None:
    """Blend recorded values into a branch's rows, in place; the prompt's as the most of any."""
    if values.shape[0] % recorded.shape[0]:
        raise ValueError(
            f"trajectory holds values of {recorded.shape[0]} pictures, the latent has "
            f"{values.shape[0]}: invert the latent that is edited"
        )
    recorded = recorded.repeat(values.shape[0] // recorded.shape[0], 1, 1, 1)
    image = recorded[:, :, text:]
    if image.shape[2] != place.image.stop - place.image.start:
        raise ValueError(
            f"trajectory holds values of {image.shape[2]} picture tokens, the model looks at "
            f"{place.image.stop - place.image.start}: invert the latent that is edited, and use no "
            "areas"
        )
    attending.blend_into(values[:, :, place.image], image, weight)
    words = place.text
    if text and words is not None and text == words.stop - words.start:
        whole = weight.amax(1, keepdim=True).expand(-1, text)
        attending.blend_into(values[:, :, words], recorded[:, :, :text], whole)


class SharedValues:
    """The source's attention of one step, for targets that run in a later call.

    Args:
        targets: uuids of all conditionings of the target.
        asked_again: whether a target can run a second time, as for guidance of other packs.
    """

    def __init__(self, targets: Iterable[Any] = (), asked_again: bool = False):
        self.kept: dict[tuple, Any] = {}
        self._targets, self._asked_again = set(targets), asked_again

    def needed_after(self, call: tap.ModelCall) -> bool:
        """Whether targets are left that have not been in this call or an earlier one."""
        self._targets -= {uuid for uuid, _ in call.branches}
        return self._asked_again or bool(self._targets)


def sharing_model(model: ModelPatcher, settings: InjectSettings) -> ModelPatcher:
    """A clone whose target branch sees the source branch's values, without any recording.

    Needs a guider that evaluates both at the same time: Source/Target or Prompt-to-Prompt Guider.
    """

    weights = _Weights(settings)

    def change(attention: tap.Attention) -> Tensor | None:
        shared = attention.call.options.get(shared_key)
        weight = weights.of(attention)
        if weight is None:
            return None
        if shared is None:
            raise ValueError(
                "Inject Values has no trajectory, so it takes values from the source prompt's "
                "branch, but this guider has none: connect a trajectory or use a Source/Target "
                "Guider"
            )
        return _exchanged(attention, weight, shared)

    clone = tap.tapped(model, tap.changing(change))
    clone.model_options["transformer_options"][sharing_key] = (
        "Pinpoint: Inject Values has no trajectory and this sampler evaluates the target prompt "
        "alone, so nothing was injected: use an Edit Sampler or connect a trajectory"
    )
    return clone


def _exchanged(attention: tap.Attention, weight: Tensor, shared: SharedValues) -> Tensor | None:
    call, place = attention.call, attention.place
    values: Tensor | None = None
    sources: dict[tuple, Tensor] = {}
    later = shared.needed_after(call)
    branches = list(enumerate(call.branches))
    for position, (uuid, index) in branches:
        if uuid in call.sources:
            rows = slice(position * call.rows, (position + 1) * call.rows)
            key = (place.block, place.grid, call.window, index)
            sources[key] = attention.v[rows, :, place.image]
            if later:
                # A copy: a view would keep the whole batch, and queries and keys with it.
                shared.kept[key] = sources[key].clone()
    for position, (uuid, index) in branches:
        if uuid in call.sources:
            continue
        # A guided target can have a negative prompt where the unguided source has none.
        keys = ((place.block, place.grid, call.window, i) for i in (index, 0))
        found = (sources.get(key, shared.kept.get(key)) for key in keys)
        source = next((tensor for tensor in found if tensor is not None), None)
        if source is None and call.sources:
            raise ValueError(
                "source and target could not be evaluated alike, so there are no values to share: "
                "give the two prompts the same length and areas, or connect a trajectory"
            )
        if source is None:
            continue
        values = attention.v.clone() if values is None else values
        rows = slice(position * call.rows, (position + 1) * call.rows)
        attending.blend_into(values[rows, :, place.image], source, weight)
    return values


def window_of(model: ModelPatcher, start: float, end: float) -> tuple[float, float]:
    """Noise levels of a part of the sampling, given from 0 (noise) to 1 (picture).

    Raises:
        ValueError: an empty part.
    """
    arguments.require_part(start, end)
    sampling: Any = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(part)) for part in (start, end))
    # At 0 percent ComfyUI gives a number above every noise level.
    return min(first, float(sampling.sigma_max)), last
