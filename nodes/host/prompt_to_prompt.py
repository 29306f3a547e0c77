"""Prompt-to-Prompt on the attention tap: the target's maps are made of the source's of the step.

Works in model calls that a Source/Target Guider marks. Only the target's positive prompt is
controlled, as published; the negative prompt's attention stays its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels import attention as attending
from ...kernels import prompt_to_prompt as maps
from ...kernels.prompt_to_prompt import Looks
from . import guiding, layouts, tap, values
from .layouts import Block, Place
from .prompt_pairs import Prompts

Grids = Literal["coarse", "all"]

heat_key = "pinpoint_blend_heat"
"""In `transformer_options`: a run's `BlendHeat`."""
blend_key = "pinpoint_blend"
"""In `transformer_options`: the `BlendSettings` of a model whose edit is held to some words."""

unshared = (
    "Pinpoint: Prompt-to-Prompt takes attention from the source prompt, but this sampler evaluates "
    "the target prompt alone, so nothing was controlled: use a Prompt-to-Prompt Guider or an Edit "
    "Sampler"
)


@dataclass(frozen=True)
class BlendSettings:
    """Local blend: outside the words' area the picture stays the source's.

    Attributes:
        threshold: part of the highest attention from which a place is inside.
        first_sigma: noise level below which it acts.
    """

    threshold: float = 0.3
    first_sigma: float = math.inf


@dataclass(frozen=True)
class ControlSettings:
    """What of attention is controlled, and how long.

    Attributes:
        blocks: transformer blocks.
        cross_sigma, self_sigma: noise levels down to which the prompt's maps and the picture's own
            are the source's; infinite for never.
        grids: where the picture's own maps are: "coarse" grids have at most half as many rows and
            columns as the latent.
    """

    blocks: frozenset[Block]
    cross_sigma: float
    self_sigma: float
    grids: Grids = "coarse"

    def crosses(self, attention: tap.Attention) -> bool:
        """Whether the prompt's maps are controlled in an attention."""
        place, sigma = attention.place, attention.call.sigma
        return place.block in self.blocks and place.text is not None and sigma > self.cross_sigma

    def keeps(self, attention: tap.Attention) -> bool:
        """Whether the picture's own maps are."""
        place, call = attention.place, attention.call
        if place.block not in self.blocks or place.kind == "cross" or call.sigma <= self.self_sigma:
            return False
        sides = zip(place.grid[1:], call.latent[-2:], strict=True)
        # Odd latents are lengthened before they are halved.
        return self.grids == "all" or all(2 * grid <= size + 1 for grid, size in sides)


@dataclass
class _Sum:
    """Maps of one grid, summed up.

    Attributes:
        source, target: (B, frames, rows * columns).
        times: how often each frame was added, as context windows overlap.
    """

    source: Tensor
    target: Tensor
    times: Tensor

    def means(self) -> tuple[Tensor, Tensor]:
        """The source's and the target's."""
        times = self.times.clamp(min=1)[:, None]
        return self.source / times, self.target / times


@dataclass
class BlendHeat:
    """Attention to the words of a local blend, summed up over a run, by the grids of tokens.

    Attributes:
        size: of the whole latent's places, ([T,] H, W).
        sums: by frames, rows and columns of all tokens, whatever window they came in.
    """

    size: tuple[int, ...]
    sums: dict[tuple[int, int, int], _Sum] = field(default_factory=dict)

    def add(self, call: tap.ModelCall, place: Place, source: Tensor, target: Tensor) -> None:
        """Add the maps of one block, (B, Q) each.

        Raises:
            ValueError: a call of which it is not known where in the picture it lies.
        """
        seen, rows, columns = place.grid
        frames = list(range(seen)) if call.window is None else self._frames(call, seen)
        if call.latent[-2:] != self.size[-2:]:
            raise ValueError(
                "blend_words need prompts for the whole picture, but one of the guider's has an "
                "area: take the area out, or leave blend_words empty"
            )
        grid = (seen if call.window is None else self.size[0], rows, columns)
        if grid not in self.sums:
            empty = source.new_zeros(2, len(source), grid[0], rows * columns)
            self.sums[grid] = _Sum(empty[0], empty[1], source.new_zeros(grid[0]))
        before, index = self.sums[grid], torch.tensor(frames, device=source.device)
        for whole, part in ((before.source, source), (before.target, target)):
            # A window's first frame may be another's, shown to it only as a beginning.
            whole.index_add_(1, index, part.unflatten(1, (seen, -1))[:, seen - len(frames) :])
        before.times.index_add_(0, index, torch.ones_like(index, dtype=source.dtype))

    def _frames(self, call: tap.ModelCall, seen: int) -> list[int]:
        """The frames of a context window."""
        frames = list(call.window or ())
        dim = getattr(call.options["context_window"], "dim", None)
        over_frames = len(self.size) == 3 and dim == 2
        if not over_frames or len(frames) > seen:
            raise ValueError(
                "blend_words need context windows over the frames of a film: set their dim to 2, "
                "or leave blend_words empty"
            )
        return frames

    def area(self, threshold: float) -> Tensor | None:
        """(B, 1, [T,] H, W), True where either prompt looks at its words; None if none did yet."""
        if not self.sums:
            return None
        # As published: 16x16 tokens for latents of 64x64.
        wanted = math.log(self.size[-2] * self.size[-1] / 16)
        grid = min(self.sums, key=lambda g: (abs(math.log(g[1] * g[2]) - wanted), g))
        areas = [
            maps.word_area(heat.view(len(heat), *grid), self.size, threshold)
            for heat in self.sums[grid].means()
        ]
        return areas[0] | areas[1]


@dataclass(frozen=True)
class _Kept:
    """A source's queries and keys of one attention, for targets that run in a later call."""

    looks: Looks
    image: slice
    """The picture's tokens among the keys, where they are."""


@dataclass(frozen=True)
class _Controller:
    """Handler of the tap."""

    settings: ControlSettings
    prompts: Prompts
    padding: maps.Side

    def __call__(self, attention: tap.Attention, proceed: tap.Proceed) -> Tensor:
        crosses, keeps = self.settings.crosses(attention), self.settings.keeps(attention)
        heat = self._heat(attention)
        if not crosses and not keeps and heat is None:
            return proceed(attention)
        pairs = self._pairs(attention)
        if not pairs:
            return proceed(attention)
        if keeps:
            attention = _looking_alike(attention, pairs)
        out = proceed(attention)
        for rows, source in pairs:
            own = _looks(attention, rows)
            if heat is not None:
                found = (
                    self._blend_map(attention, looks, i)
                    for i, looks in ((0, source.looks), (1, own))
                )
                heat.add(attention.call, attention.place, *found)
            if crosses:
                out[rows, attention.place.image] = self._edited(attention, rows, own, source.looks)
        return out

    def _heat(self, attention: tap.Attention) -> BlendHeat | None:
        """Where the words' maps are summed up, if this attention has any."""
        place = attention.place
        if self.prompts.blend is None or place.text is None:
            return None
        return attention.call.options.get(heat_key) if place.block in self.settings.blocks else None

    def _pairs(self, attention: tap.Attention) -> list[tuple[slice, _Kept]]:
        """The rows of each of the target's parts, and the looks of the source's that it takes.

        There are none in calls that evaluate one prompt alone, and in those that other packs make
        beside the guider's.
        """
        call, place = attention.call, attention.place
        shared: values.SharedValues | None = call.options.get(values.shared_key)
        if shared is None:
            raise ValueError(
                "Prompt-to-Prompt takes attention from the source prompt's branch, but this guider "
                "has none: use a Prompt-to-Prompt Guider"
            )
        if not call.sources:
            return []
        base = (id(self), place.block, place.kind, place.grid, call.window)
        here: dict[tuple, _Kept] = {}
        targets = []
        for i, (uuid, index) in enumerate(call.branches):
            rows = slice(i * call.rows, (i + 1) * call.rows)
            if index == 0 and uuid in call.sources:
                key = (*base, uuid)
                here[key] = _Kept(_looks(attention, rows), place.image)
            elif index == 0:
                targets.append((rows, (*base, _partner(call, uuid))))
        if here and shared.needed_after(call):
            shared.kept |= {key: _cloned(source) for key, source in here.items()}
        if any(key not in here and key not in shared.kept for _, key in targets):
            raise ValueError(
                "source and target could not be evaluated alike, so there is no attention to take: "
                "give the two prompts the same areas, in the same order"
            )
        return [(rows, here.get(key) or shared.kept[key]) for rows, key in targets]

    def _edited(self, attention: tap.Attention, rows: slice, own: Looks, source: Looks) -> Tensor:
        """(B, picture's tokens, heads * width) of a target with its prompt's maps edited."""
        edit, counts = self.prompts.edit, (_words(source), _words(own))
        times = _times(attention.place, edit.mapping.shape, counts)
        edit = edit.padded(*counts, self.padding) if times is None else edit.repeated(*times)
        edited = maps.edited_attention(
            own, source, attention.v[rows], edit.to(own.q), attention.scale
        )
        return edited.transpose(1, 2).flatten(2).to(attention.v.dtype)

    def _blend_map(self, attention: tap.Attention, looks: Looks, which: int) -> Tensor:
        """(B, picture's tokens): attention of the source (0) or target (1) to the blend's words."""
        assert self.prompts.blend is not None
        given, count = self.prompts.blend[which], _words(looks)
        times = _times(attention.place, given.shape, (count,))
        more = count - len(given)
        ends = (more, 0) if self.padding == "left" else (0, more)
        words = F.pad(given, ends) if times is None else given.repeat(times)
        columns = F.pad(words, (looks.text.start, looks.k.shape[2] - looks.text.stop))
        found = attending.attention_to(
            looks.q, looks.k, columns[:, None], attention.scale, looks.mask
        )
        return found[..., 0]


def _partner(call: tap.ModelCall, uuid: Any) -> Any:
    """Which of the source's parts one of the target's takes its attention from.

    Raises:
        ValueError: there are several, and not as many as the target has.
    """
    sources, targets = call.options[guiding.parts_key]
    if len(sources) == 1:
        return sources[0]
    if len(sources) != len(targets) or uuid not in targets:
        raise ValueError(
            f"source has {len(sources)} parts and target {len(targets)}, so that it is not known "
            "whose attention each takes: give the two prompts the same areas, in the same order"
        )
    return sources[targets.index(uuid)]


def _words(looks: Looks) -> int:
    return looks.text.stop - looks.text.start


def _times(place: Place, given: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...] | None:
    """How often each prompt stands among an attention's keys; None if they are lengthened instead.

    Raises:
        ValueError: other prompts than the given ones.
    """
    pairs = list(zip(given, counts, strict=True))
    crossing = place.kind == "cross"
    if any(count % length if crossing else count < length for length, count in pairs):
        raise ValueError(
            f"guider has a prompt of {max(counts)} tokens where Prompt-to-Prompt made one of "
            f"{max(given)}: connect its source and target outputs to the guider"
        )
    # ComfyUI repeats prompts of UNets to share a call; joint attention has padding of the model's.
    return tuple(count // length for length, count in pairs) if crossing else None


def _looks(attention: tap.Attention, rows: slice) -> Looks:
    """What the picture's tokens of one branch look with, and at."""
    place, mask = attention.place, attention.mask
    if mask is not None:
        mask = mask[rows] if mask.ndim > 2 and len(mask) > 1 else mask
        mask = mask[..., place.image, :] if mask.shape[-2] > 1 else mask
    queries = attention.q[rows, :, place.image]
    return Looks(queries, attention.k[rows], mask, place.text or slice(0, 0))


def _cloned(source: _Kept) -> _Kept:
    """A copy, as what is a view of a batch would keep all of it."""
    looks = source.looks
    return replace(source, looks=looks._replace(q=looks.q.clone(), k=looks.k.clone()))


def _looking_alike(attention: tap.Attention, pairs: list[tuple[slice, _Kept]]) -> tap.Attention:
    """An attention in which the target's picture has the source's queries and keys.

    With the target's values this is the published replacement of self-attention maps, and costs
    nothing. In joint attention it is that of Shin et al., 2025 (arXiv 2508.07519).
    """
    image, q, k = attention.place.image, attention.q.clone(), attention.k.clone()
    for rows, source in pairs:
        q[rows, :, image] = source.looks.q
        k[rows, :, image] = source.looks.k[:, :, source.image]
    return replace(attention, q=q, k=k)


def controlled(
    model: ModelPatcher,
    prompts: Prompts,
    settings: ControlSettings,
    blend: BlendSettings | None = None,
) -> ModelPatcher:
    """A clone whose target prompt looks where its source prompt looks.

    The guider evaluates both (`guiding.SourceTargetGuider`, `prompt_guiding.PairGuider`). What
    other handlers make of queries, keys, values and masks, before or after, counts.
    """
    controller = _Controller(settings, prompts, layouts.layout_of(model).text_padding)
    clone = tap.tapped(model, controller, innermost=True)
    options = clone.model_options["transformer_options"]
    options[values.sharing_key] = unshared
    if blend is not None and prompts.blend is not None:
        options[blend_key] = blend
    if not torch.all(prompts.edit.weight == 1):
        options[guiding.differing_key] = True
    return clone


def sigma_after(model: ModelPatcher, until: float) -> float:
    """The noise level above which the first part of the sampling is, given from 0 to 1."""
    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(until))
    # Noise levels come in float32.
    return sigma * (1 + 1e-4)
