"""An adapter's attention added to a model's own.

The picture's queries look at the adapter's tokens in an attention of its own, whose result is added
to the block's (decoupled cross-attention, as in IP-Adapter and FlexIP). The tokens have no place in
the picture: where a model turns queries by their place (Flux), theirs is the prompt's, zero.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...kernels import masks
from ...kernels.flexip import Gated, Mode, gated_attention
from . import adapters, arguments, families, layouts, progress, step_prompts, tap
from .adapters import Adapter
from .gates import Gate, Schedule
from .layouts import Block, Place
from .subjects import Subject
from .tap import Attention, ModelCall, Proceed

log = logging.getLogger(__name__)

models_key = "pinpoint_adapters"
largest_kept = 2**28
"""Bytes of keys and values that are kept over the steps of a run; beyond, they are made anew."""
most_kept = 32
"""Prompts that are kept over the steps of a run: trainings have new ones in every step."""


@dataclass(frozen=True)
class Settings:
    """How an adapter acts.

    Attributes:
        weight: of its attention; 0 = the model is untouched.
        gate: gamma, 1 = preserve, 0 = adapt to the prompt.
        mode: how gamma acts, see `gated_attention`.
        start, end: of the sampling, 0 = noise, 1 = picture.
        blocks: names of those in which it acts.
        mask: (B or 1, H, W) where it acts, or everywhere.
    """

    weight: float
    gate: Gate
    mode: Mode
    start: float = 0.0
    end: float = 1.0
    blocks: str = "all"
    mask: Tensor | None = None


def applied(
    model: ModelPatcher, adapter: Adapter, subject: Subject, settings: Settings
) -> ModelPatcher:
    """A clone of a model whose attention also looks at a subject.

    Raises:
        ValueError: an adapter of another model, a subject of other encoders, or settings that
            cannot be used.
    """
    adapters.require_fitting(model, adapter, subject)
    arguments.require_part(settings.start, settings.end)
    if settings.mask is not None:
        arguments.require_finite_mask(settings.mask)
        if not settings.mask.any():
            progress.warn(f"mask is empty, so {adapter.name} does nothing")
        settings = replace(settings, mask=arguments.mask_batch(settings.mask))
    chosen = layouts.chosen_blocks(model, settings.blocks)
    schedules = {
        block: schedule
        for block, schedule in settings.gate.of_blocks(model).items()
        if block in chosen and block in adapter.blocks
    }
    if not schedules:
        raise ValueError(
            f"blocks is '{settings.blocks}', in which adapter {adapter.name} has no gate: choose "
            f"from {layouts.ranges(list(adapter.blocks))}"
        )
    clone = model.clone()
    if settings.weight == 0:
        return clone
    _load_with(clone, adapter)
    injection = _Injection(adapter, subject, settings, schedules)
    clone = tap.tapped(step_prompts.remembering(clone), injection, replaced=True)
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, models_key, injection.forget)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, models_key, injection.check_window)
    return clone


def _load_with(model: ModelPatcher, adapter: Adapter) -> None:
    """Let ComfyUI load the adapter's network whenever it loads the model."""
    others = model.get_additional_models_with_key(models_key)
    if all(other.model is not adapter.patcher.model for other in others):
        # Of a clone, ComfyUI knows that the adapter lives on when the clone is forgotten.
        model.set_additional_models(models_key, [*others, adapter.patcher.clone()])


@dataclass
class _Tokens:
    """What an adapter made of one conditioning.

    Attributes:
        text: the prompt.
        tokens: of each branch.
        call: the last one that they were found to be of.
        seen_by: what blocks see of them, as far as it is kept.
        bytes: of what is kept.
    """

    text: Tensor
    tokens: list[Tensor]
    call: weakref.ref[ModelCall]
    seen_by: dict[Block, list[Gated]] = field(default_factory=dict)
    bytes: int = 0

    def are_of(self, call: ModelCall, text: Tensor) -> bool:
        """Whether a call's prompt is the same; guiders may change it from step to step."""
        if self.call() is call:
            return True
        if text.requires_grad or self.is_learned or not torch.equal(self.text, text):
            return False
        self.call = weakref.ref(call)
        return True

    @property
    def is_learned(self) -> bool:
        """Whether gradients flow through it; then it belongs to one call."""
        return self.text.requires_grad


@dataclass
class _Injection:
    """Handles attentions: adds what the picture sees of a subject."""

    adapter: Adapter
    subject: Subject
    settings: Settings
    schedules: Mapping[Block, Schedule]
    _made: dict[Hashable, _Tokens] = field(default_factory=dict)
    _strengths: dict[Hashable, Tensor] = field(default_factory=dict)
    _warned: bool = False

    def forget(self, _model: ModelPatcher) -> None:
        """Free what was kept over the steps of a run."""
        self._made.clear()
        self._strengths.clear()
        self._warned = False

    def check_window(
        self, executor: Callable[..., Tensor], guider: Any, sigmas: Tensor, *others: Any
    ) -> Tensor:
        """A wrapper of SAMPLER_SAMPLE: tells before a run if it has no step to act in."""
        sampling = guider.inner_model.model_sampling
        # The first one inside ends the search.
        levels = (families.progress(sampling, float(sigma)) for sigma in sigmas[:-1])
        is_sampling = not comfy.model_management.in_training and len(sigmas) > 1
        if is_sampling and not any(map(self._is_inside, levels)):
            progress.warn(
                f"no step of this run lies between start {self.settings.start:g} and end "
                f"{self.settings.end:g}, so {self.adapter.name} does nothing"
            )
        return executor(guider, sigmas, *others)

    def __call__(self, attention: Attention, proceed: Proceed) -> Tensor:
        """See `tap.Handler`."""
        out = proceed(attention)
        call, place = attention.call, attention.place
        schedule = self.schedules.get(place.block)
        if place.text is None or call.text is None or schedule is None:
            return out
        if not self._is_inside(call.progress):
            return out
        gamma = schedule.at(call.progress)
        added = self._read(attention, (gamma, 1 - gamma)) * self._strength(call, place, out)
        out = out.clone()
        out[:, place.image] += added.to(out)
        return out

    def _is_inside(self, level: float) -> bool:
        """Whether it acts there; as coarse as `families.progress` is."""
        return self.settings.start - 1e-4 <= level <= self.settings.end + 1e-4

    def _strength(self, call: ModelCall, place: Place, out: Tensor) -> float | Tensor:
        """The weight at each of the picture's tokens, (B, tokens, 1)."""
        mask = self.settings.mask
        if mask is None:
            return self.settings.weight
        arguments.require_masks_for(mask, call.rows)
        alike = (tuple(call.branches), call.latent, place.grid, out.dtype, out.device)
        if alike not in self._strengths:
            frames, *size = place.grid
            parts = []
            for position in range(len(call.branches)):
                part = step_prompts.mask_of(mask.float(), call, position)
                inside = masks.resized(part, *size).clamp(0, 1).to(out).flatten(1)
                parts.append(inside.repeat(call.rows // len(mask), frames))
            self._strengths[alike] = self.settings.weight * torch.cat(parts)[..., None]
        return self._strengths[alike]

    def _read(self, attention: Attention, gains: tuple[float, float]) -> Tensor:
        """(B, picture's tokens, width): each conditioning's rows look at its own tokens.

        Raises:
            ValueError: rows that belong to no conditioning.
        """
        call, read = attention.call, []
        if len(attention.q) != call.latent[0]:
            raise ValueError(
                f"another node, such as one for attention couple, gives block "
                f"{attention.place.block} {len(attention.q)} rows where there are "
                f"{call.latent[0]} latents, and adapter {self.adapter.name} cannot know whose they "
                "are: use Conditioning (Set Mask) or (Set Area) for prompts of regions, or blocks "
                "without that node"
            )
        q = attention.q[:, :, attention.place.image]
        for position in range(len(call.branches)):
            rows = slice(position * call.rows, (position + 1) * call.rows)
            branches = self._seen(self._tokens(call, position, rows, q), attention.place.block)
            read.append(gated_attention(q[rows], branches, gains, self.settings.mode))
        return torch.cat(read)

    def _seen(self, made: _Tokens, block: Block) -> list[Gated]:
        if block in made.seen_by:
            return made.seen_by[block]
        found = [
            branch.keys_values(block, tokens)
            for branch, tokens in zip(self.adapter.branches, made.tokens, strict=True)
        ]
        size = sum(t.nbytes for gated in found for t in gated)
        if sum(each.bytes for each in self._made.values()) + size <= largest_kept:
            made.bytes += size
            made.seen_by[block] = found
        elif not self._warned:
            self._warned = True
            log.info(
                f"Pinpoint: {self.adapter.name} has more than {largest_kept >> 20} MB of keys and "
                "values, of which the rest is made anew in each step"
            )
        return found

    def _tokens(self, call: ModelCall, position: int, rows: slice, q: Tensor) -> _Tokens:
        """Made once for each conditioning of a run; the one used last is kept longest."""
        assert call.text is not None
        text, (uuid, kind) = call.text[rows], call.branches[position]
        prompt = step_prompts.prompt_of(call, position)
        key = (uuid, kind, None if uuid else position, tuple(text.shape), q.dtype, q.device)
        made = self._made.pop(key, None)
        if made is None or not made.are_of(call, text):
            self._make_room(max(most_kept, len(call.branches)))
            tokens = self._make(_unrepeated(text, prompt.length).to(q), not prompt.is_negative)
            made = _Tokens(text, tokens, weakref.ref(call))
        self._made[key] = made
        return made

    def _make_room(self, most: int) -> None:
        """For one more prompt."""
        for key, made in list(self._made.items()):
            if len(self._made) >= most or (made.is_learned and made.call() is None):
                del self._made[key]

    def _make(self, text: Tensor, seen: bool) -> list[Tensor]:
        wanted = self.adapter.text_width
        if wanted not in (None, text.shape[-1]):
            raise ValueError(
                f"adapter {self.adapter.name} reads prompts {wanted} wide, the model is given "
                f"{text.shape[-1]}: load the text encoders that belong to the model"
            )
        if len(text) > 1 and bool((text == text[:1]).all()):
            text = text[:1]
        return [branch.tokens(self.subject, text, seen) for branch in self.adapter.branches]


def _unrepeated(text: Tensor, length: int | None) -> Tensor:
    """A prompt without the repeats that ComfyUI gives it to batch it with longer ones."""
    if not length or text.shape[1] % length or text.shape[1] == length:
        return text
    own = text[:, :length]
    is_repeated = torch.equal(own.repeat(1, text.shape[1] // length, 1), text)
    return own if is_repeated else text
