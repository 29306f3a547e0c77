"""Attention values: recorded on the way to noise, injected on the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels import attention as attending
from ...kernels import masks, solvers
from . import families, layouts, tap
from .inversion import Trajectory
from .layouts import Block, Place

Tokens = Literal["image", "image and text"]
Precision = Literal["fp16", "bf16", "fp8", "fp32"]
PRECISIONS: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32,
}
recording_key = "pinpoint_recording"
"""In `transformer_options`: where a run puts the values that its model is told to record."""
recorder_key = "pinpoint_recorder"
"""In `transformer_options`: the settings of a model that records."""
sharing_key = "pinpoint_shares_values"
"""In `transformer_options`: set on a model whose target takes attention from the source's branch,
to the warning for samplers that do not evaluate it."""
shared_key = "pinpoint_shared_values"
"""In `transformer_options`: a step's source attention, for targets that run in a later call."""


@dataclass(frozen=True)
class RecordSettings:
    """What is recorded.

    Attributes:
        blocks: transformer blocks.
        first_sigma, last_sigma: noise levels, first >= last.
        tokens: the picture's only, or the prompt's too.
        precision: storage type; fp8 keeps a scale for each tensor.
        on_gpu: keep values where they are made instead of on the CPU.
        limit: most bytes that a recording may take.
    """

    blocks: frozenset[Block]
    first_sigma: float
    last_sigma: float
    tokens: Tokens = "image"
    precision: Precision = "fp16"
    on_gpu: bool = False
    limit: float = math.inf

    def cost(
        self, model: ModelPatcher, latent: Tensor, text_length: int, sigmas: list[float]
    ) -> int:
        """Bytes that the values of a run with these evaluations take."""
        kept = sum(self.wants(sigma) for sigma in sigmas)
        sizes = layouts.value_sizes(model, tuple(latent.shape))
        text = text_length if self.tokens == "image and text" else 0
        numbers = sum(
            (sizes[b].tokens + text * sizes[b].joint) * sizes[b].width for b in self.blocks
        )
        return kept * numbers * len(latent) * PRECISIONS[self.precision].itemsize

    def wants(self, sigma: float) -> bool:
        """Whether values at a noise level are recorded."""
        return self.last_sigma - 1e-6 <= sigma <= self.first_sigma + 1e-6


@dataclass(frozen=True)
class _Kept:
    values: Tensor
    scale: Tensor | None
    text: int


@dataclass
class Recording:
    """Values of one run, by block, context window and noise level."""

    settings: RecordSettings
    kept: dict[tuple[Block, tuple[int, ...] | None], dict[float, _Kept]] = field(
        default_factory=dict
    )

    @property
    def bytes(self) -> int:
        """Memory that the values take."""
        return sum(k.values.nbytes for levels in self.kept.values() for k in levels.values())

    def keep(self, attention: tap.Attention) -> None:
        """Record an attention's values, unless the same were recorded before."""
        call, place, settings = attention.call, attention.place, self.settings
        if not _is_chosen(place, settings.blocks) or not settings.wants(call.sigma):
            return
        levels = self.kept.setdefault((place.block, call.window), {})
        rows = call.rows_of(lambda _uuid, index: index == 0)
        if not rows or call.sigma in levels:
            return
        text = place.image.start if place.text and settings.tokens == "image and text" else 0
        span = slice(place.image.start - text, place.image.stop)
        values = attention.v[rows[0], :, span]
        levels[call.sigma] = self._stored(values, text)

    def _stored(self, values: Tensor, text: int) -> _Kept:
        dtype, scale = PRECISIONS[self.settings.precision], None
        if dtype == torch.float8_e4m3fn:
            scale = values.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
            values = values / scale.to(values)
        values = values.to(dtype, copy=True)
        if not self.settings.on_gpu and values.device.type != "cpu":
            values = values.cpu().pin_memory() if values.is_cuda else values.cpu()
        return _Kept(values, scale, text)

    def nearest(self, attention: tap.Attention) -> tuple[Tensor, int] | None:
        """The recorded values (B, H, L, D) nearest in noise level, and how many are text's."""
        levels = self.kept.get((attention.place.block, attention.call.window))
        if not levels:
            return None
        sigma = min(levels, key=lambda level: abs(level - attention.call.sigma))
        kept, like = levels[sigma], attention.v
        values = kept.values.to(like.device, like.dtype, non_blocking=True)
        return (values if kept.scale is None else values * kept.scale.to(like)), kept.text


def recording_model(model: ModelPatcher, settings: RecordSettings) -> ModelPatcher:
    """A clone that records its attention values wherever a run asks for them."""

    def look(attention: tap.Attention) -> None:
        recording = attention.call.options.get(recording_key)
        if recording is not None:
            recording.keep(attention)

    clone = tap.tapped(model, tap.observing(look))
    clone.model_options["transformer_options"][recorder_key] = settings
    return clone


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

    def weight(self, attention: tap.Attention) -> Tensor | None:
        """(B, tokens of the picture): how much of the recorded values; None where nothing.

        Raises:
            ValueError: the mask's batch is not the latent's.
        """
        place, call, like = attention.place, attention.call, attention.v
        if not _is_chosen(place, self.blocks):
            return None
        span = max(self.first_sigma - self.last_sigma, 1e-9)
        # Noise levels come in float32.
        progress = round((self.first_sigma - call.sigma) / span, 4)
        strength = solvers.strength_at(progress, self.strength, 0.0, 1.0, self.trend)
        if strength == 0:
            return None
        frames, height, width = place.grid
        if self.mask is None:
            return like.new_full((call.rows, math.prod(place.grid)), strength)
        # Edits with several noises at once have all pictures once for each.
        if call.rows % len(self.mask):
            raise ValueError(
                f"mask has {len(self.mask)} images, the latent {call.rows}: use one mask, or one "
                "for each"
            )
        mask = masks.resized(self.mask.float(), height, width).clamp(0, 1)
        weight = strength * (1 - mask.to(like)).flatten(1)
        return weight.repeat(call.rows // len(mask), frames)


def _is_chosen(place: Place, blocks: frozenset[Block]) -> bool:
    """Whether a place's values are among those of some blocks.

    Of the two attentions in a block of SD3.5-medium these are the values that text and picture see.
    """
    second = place.kind == "self" and place.block.kind == "joint"
    return place.block in blocks and place.kind != "cross" and not second


def injecting_model(
    model: ModelPatcher, settings: InjectSettings, recording: Recording
) -> ModelPatcher:
    """A clone that sees the recorded values in place of its own.

    All branches that draw the new picture get them, the negative prompt's too.
    """

    def change(attention: tap.Attention) -> Tensor | None:
        weight = settings.weight(attention)
        found = None if weight is None else recording.nearest(attention)
        if weight is None or found is None:
            return None
        recorded, text = found
        call = attention.call
        values = attention.v.clone()
        for rows in call.rows_of(lambda uuid, _index: uuid not in call.sources):
            _blend(values[rows], recorded, weight, attention.place, text)
        return values

    return tap.tapped(model, tap.changing(change))


def recording_for(
    model: ModelPatcher, trajectory: Trajectory, settings: InjectSettings
) -> Recording:
    """The values of a trajectory, checked against where they are to be injected.

    Raises:
        ValueError: no values, those of another family, or none of the chosen blocks.
    """
    recording = trajectory.values
    if recording is None:
        raise ValueError(
            "trajectory holds no attention values: put Record Values before the model of Invert"
        )
    trajectory.require_family(families.name(model))
    recorded = recording.settings
    if not settings.blocks & recorded.blocks:
        raise ValueError(
            "blocks names none of the recorded blocks: give Record Values and Inject Values the "
            "same blocks"
        )
    if settings.first_sigma < recorded.last_sigma or settings.last_sigma > recorded.first_sigma:
        raise ValueError(
            "start and end lie outside the recorded part of the steps: give Record Values and "
            "Inject Values the same start and end"
        )
    return recording


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
    values[:, :, place.image] = attending.blended_values(values[:, :, place.image], image, weight)
    if text and text == place.image.start:
        whole = weight.amax(1, keepdim=True).expand(-1, text)
        words = slice(0, text)
        values[:, :, words] = attending.blended_values(
            values[:, :, words], recorded[:, :, words], whole
        )


class SharedValues:
    """The source's attention of one step, kept until the target's branch has seen it."""

    def __init__(self) -> None:
        self.kept: dict[tuple, Any] = {}


def sharing_model(model: ModelPatcher, settings: InjectSettings) -> ModelPatcher:
    """A clone whose target branch sees the source branch's values, without any recording.

    Needs a Source/Target Guider, which evaluates both at the same time.
    """

    def change(attention: tap.Attention) -> Tensor | None:
        shared = attention.call.options.get(shared_key)
        weight = settings.weight(attention)
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
    values = None
    branches = list(enumerate(call.branches))
    for position, (uuid, index) in branches:
        if uuid in call.sources:
            rows = slice(position * call.rows, (position + 1) * call.rows)
            key = (place.block, place.grid, call.window, index)
            shared.kept[key] = attention.v[rows, :, place.image].clone()
    for position, (uuid, index) in branches:
        if uuid in call.sources:
            continue
        # A guided target can have a negative prompt where the unguided source has none.
        keys = ((place.block, place.grid, call.window, i) for i in (index, 0))
        kept = (shared.kept.get(key) for key in keys)
        source = next((tensor for tensor in kept if tensor is not None), None)
        if source is None and call.sources:
            raise ValueError(
                "source and target could not be evaluated alike, so there are no values to share: "
                "give the two prompts the same length and areas, or connect a trajectory"
            )
        if source is None:
            continue
        values = attention.v.clone() if values is None else values
        rows = slice(position * call.rows, (position + 1) * call.rows)
        own = values[rows, :, place.image]
        values[rows, :, place.image] = attending.blended_values(own, source, weight)
    return values


def window_of(model: ModelPatcher, start: float, end: float) -> tuple[float, float]:
    """Noise levels of a part of the sampling, given from 0 (noise) to 1 (picture).

    Raises:
        ValueError: an empty part.
    """
    if start >= end:
        raise ValueError(
            f"start is {start:g} and end {end:g}: choose a start below the end, 0 is noise and 1 "
            "the picture"
        )
    sampling: Any = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(part)) for part in (start, end))
    # At 0 percent ComfyUI gives a number above every noise level.
    return min(first, float(sampling.sigma_max)), last
