"""Prompt-to-Prompt on the attention tap: the target's maps are made of the source's of the step.

Works in model calls that a Source/Target Guider marks. Only the target's positive prompt is
controlled, as published; the negative prompt's attention stays its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

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
class BlendHeat:
    """Attention to the words of a local blend, summed up over a run, by the grids of tokens."""

    sums: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, grid: tuple[int, int, int], source: Tensor, target: Tensor) -> None:
        """Add the maps of one block, (B, Q) each."""
        before = self.sums.get(grid, (0, 0))
        self.sums[grid] = (before[0] + source, before[1] + target)

    def area(self, latent: Tensor, threshold: float) -> Tensor | None:
        """(B, 1, [T,] H, W), True where either prompt looks at its words; None if none did yet."""
        if not self.sums:
            return None
        size = latent.shape[2:]
        # As published: 16x16 tokens for latents of 64x64.
        wanted = math.log(size[-2] * size[-1] / 16)
        grid = min(self.sums, key=lambda g: (abs(math.log(g[1] * g[2]) - wanted), g))
        areas = [
            maps.word_area(heat.view(len(heat), *grid), tuple(size), threshold)
            for heat in self.sums[grid]
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
        source, targets = self._pair(attention)
        if source is None:
            return proceed(attention)
        if keeps:
            attention = _looking_alike(attention, source, targets)
        out = proceed(attention)
        for rows in targets:
            own = _looks(attention, rows)
            if heat is not None:
                found = (
                    self._blend_map(attention, looks, i)
                    for i, looks in ((0, source.looks), (1, own))
                )
                heat.add(attention.place.grid, *found)
            if crosses:
                out[rows, attention.place.image] = self._edited(attention, rows, own, source.looks)
        return out

    def _heat(self, attention: tap.Attention) -> BlendHeat | None:
        """Where the words' maps are summed up, if this attention has any."""
        place = attention.place
        if self.prompts.blend is None or place.text is None:
            return None
        return attention.call.options.get(heat_key) if place.block in self.settings.blocks else None

    def _pair(self, attention: tap.Attention) -> tuple[_Kept | None, list[slice]]:
        """The source's looks, and the rows of the targets that take them.

        There is no source in calls that evaluate one prompt alone, and in those that other packs
        make beside the guider's.
        """
        call, place = attention.call, attention.place
        shared: values.SharedValues | None = call.options.get(values.shared_key)
        if shared is None:
            raise ValueError(
                "Prompt-to-Prompt takes attention from the source prompt's branch, but this guider "
                "has none: use a Prompt-to-Prompt Guider"
            )
        sources = call.rows_of(lambda uuid, index: index == 0 and uuid in call.sources)
        targets = call.rows_of(lambda uuid, index: index == 0 and uuid not in call.sources)
        key = (id(self), place.block, place.kind, place.grid, call.window)
        if sources:
            source = _Kept(_looks(attention, sources[0]), place.image)
            shared.kept[key] = None if targets else _cloned(source)
            return (source if targets else None), targets
        if not targets or not call.sources:
            return None, []
        if key not in shared.kept:
            raise ValueError(
                "source and target could not be evaluated alike, so there is no attention to take: "
                "give the two prompts the same areas"
            )
        return shared.kept[key], targets

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


def _looking_alike(attention: tap.Attention, source: _Kept, targets: list[slice]) -> tap.Attention:
    """An attention in which the target's picture has the source's queries and keys.

    With the target's values this is the published replacement of self-attention maps, and costs
    nothing. In joint attention it is that of Shin et al., 2025 (arXiv 2508.07519).
    """
    image, q, k = attention.place.image, attention.q.clone(), attention.k.clone()
    for rows in targets:
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
