"""Attention values, recorded on the way to noise."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from comfy.context_windows import IndexListContextHandler
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from . import layouts, tap
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
        self,
        model: ModelPatcher,
        latent: Tensor,
        text_length: int,
        levels: list[float],
        schedule: list[float],
    ) -> int:
        """Bytes that the values of a run take.

        Args:
            model: the one that runs.
            latent: (B, C, [T,] H, W).
            text_length: tokens of the prompt as the model is given them.
            levels: at which it is evaluated, in this order.
            schedule: the run's sigmas.
        """
        text = text_length if self.tokens == "image and text" else 0
        numbers = 0
        shapes = _called_shapes(model, latent, levels, schedule)
        for level, called in zip(levels, shapes, strict=True):
            for shape in called if self.wants(level) else ():
                sizes = layouts.value_sizes(model, shape, text)
                counts = ((sizes[b].tokens + sizes[b].text) * sizes[b].width for b in self.blocks)
                numbers += shape[0] * sum(counts)
        return numbers * PRECISIONS[self.precision].itemsize

    def wants(self, sigma: float) -> bool:
        """Whether values at a noise level are recorded."""
        return self.last_sigma - 1e-6 <= sigma <= self.first_sigma + 1e-6

    def require_room(self, size: int) -> None:
        """Refuse to take more bytes than the limit.

        Raises:
            ValueError: it is more.
        """
        if size > self.limit:
            raise ValueError(
                f"recording would take {size / 1e9:.2f} GB, its limit is "
                f"{self.limit / 1e9:.2f} GB: choose fewer blocks, a shorter part of the steps, "
                "fp8, or raise limit_gb in Record Values"
            )


def _called_shapes(
    model: ModelPatcher, latent: Tensor, levels: list[float], schedule: list[float]
) -> list[list[tuple[int, ...]]]:
    """Shapes of the latents with which a model is called at each level: several in windows."""
    whole, handler = tuple(latent.shape), model.model_options.get("context_handler")
    # What handlers of other packs do cannot be known; `Recording.keep` holds their limit.
    if not isinstance(handler, IndexListContextHandler):
        return [[whole]] * len(levels)
    # It remembers the step, on which its windows can depend.
    handler, dim = copy.copy(handler), handler.dim
    if whole[dim] <= handler.context_length:
        return [[whole]] * len(levels)
    options = {"transformer_options": {"sample_sigmas": torch.tensor(schedule)}}
    shapes = []
    for level in levels:
        handler.set_step(torch.tensor([level]), options)
        windows = handler.get_context_windows(model.model, latent, options)
        lengths = []
        for window in dict.fromkeys(tuple(window.index_list) for window in windows):
            # The frame before the window can go with it, and is dropped afterwards.
            leads = handler.causal_window_fix and 0 < window[0] <= whole[dim]
            lengths.append(len(window) + leads)
        shapes.append([(*whole[:dim], length, *whole[dim + 1 :]) for length in lengths])
    return shapes


@dataclass(frozen=True)
class _Kept:
    values: Tensor
    scale: Tensor | None
    text: int


@dataclass
class Recording:
    """Values of one run, by block, context window and noise level.

    Attributes:
        settings: what is recorded.
        kept: the values.
        bytes: memory that they take.
    """

    settings: RecordSettings
    kept: dict[tuple[Block, tuple[int, ...] | None], dict[float, _Kept]] = field(
        default_factory=dict
    )
    bytes: int = 0

    def keep(self, attention: tap.Attention) -> None:
        """Record an attention's values, unless the same were recorded before.

        Raises:
            ValueError: they would take more memory than was allowed.
        """
        call, place, settings = attention.call, attention.place, self.settings
        if not is_chosen(place, settings.blocks) or not settings.wants(call.sigma):
            return
        rows = call.rows_of(lambda _uuid, index: index == 0)
        key = place.block, call.window
        if not rows or call.sigma in self.kept.get(key, ()):
            return
        values, text = attention.v[rows[0], :, place.image], 0
        if place.text is not None and settings.tokens == "image and text":
            text = place.text.stop - place.text.start
            values = torch.cat([attention.v[rows[0], :, place.text], values], 2)
        size = self.bytes + values.numel() * PRECISIONS[settings.precision].itemsize
        settings.require_room(size)
        self.kept.setdefault(key, {})[call.sigma] = self._stored(values, text)
        self.bytes = size

    def _stored(self, values: Tensor, text: int) -> _Kept:
        dtype, scale = PRECISIONS[self.settings.precision], None
        if dtype == torch.float8_e4m3fn:
            # In fp16 the scale of small values would be 0.
            values = values.float()
            scale = values.abs().amax().clamp(min=1e-12) / torch.finfo(dtype).max
            values = values / scale
        values = values.to(dtype, copy=True)
        if not self.settings.on_gpu and values.device.type != "cpu":
            values = values.cpu().pin_memory() if values.is_cuda else values.cpu()
        return _Kept(values, scale, text)

    def nearest(self, attention: tap.Attention) -> tuple[Tensor, int]:
        """The recorded values (B, H, L, D) nearest in noise level, and how many are text's.

        Text comes first, then the picture.

        Raises:
            ValueError: none of this block and context window.
        """
        call, like = attention.call, attention.v
        levels = self.kept.get((attention.place.block, call.window))
        if not levels:
            frames = "all frames at once"
            if call.window is not None:
                frames = f"frames {', '.join(map(str, call.window))}"
            raise ValueError(
                f"trajectory holds no attention values of {attention.place.block} for {frames}: "
                "give the models of Invert and of the sampler the same context windows, in a "
                "schedule that does not move them from step to step"
            )
        kept = levels[min(levels, key=lambda level: abs(level - call.sigma))]
        if kept.scale is None:
            return kept.values.to(like.device, like.dtype, non_blocking=True), kept.text
        values = kept.values.to(like.device, non_blocking=True).float()
        return (values * kept.scale.to(like.device)).to(like.dtype), kept.text


def recording_model(model: ModelPatcher, settings: RecordSettings) -> ModelPatcher:
    """A clone that records its attention values wherever a run asks for them."""

    def look(attention: tap.Attention) -> None:
        recording = attention.call.options.get(recording_key)
        if recording is not None:
            recording.keep(attention)

    clone = tap.tapped(model, tap.observing(look))
    clone.model_options["transformer_options"][recorder_key] = settings
    return clone


def is_chosen(place: Place, blocks: frozenset[Block]) -> bool:
    """Whether a place's values are among those of some blocks.

    Of the two attentions in a block of SD3.5-medium these are the values that text and picture see.
    """
    second = place.kind == "self" and place.block.kind == "joint"
    return place.block in blocks and place.kind != "cross" and not second
