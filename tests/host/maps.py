"""Prompt-to-Prompt for tests: through the pack, and by whole attention maps of an own override."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import stock
from .tapping import WORDS, Family

UNETS = ("SD1.5", "SDXL")
SIGMA = 0.7
"""The noise level at which a target is asked for its velocity."""


@dataclass
class WholeMaps:
    """A model whose every attention is computed from a whole map.

    Attributes:
        change: what becomes of the numbered attention's map.
        look: what becomes of its queries and keys, before that.
        seen, looks: the maps, queries and keys of the last call.
    """

    model: Any
    change: Callable[[int, Tensor], Tensor] = lambda _number, maps: maps
    look: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda _number, q, k: (q, k)
    seen: dict[int, Tensor] = field(default_factory=dict)
    looks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.patched = self.model.clone()
        options = self.patched.model_options["transformer_options"]
        options["optimized_attention_override"] = self._attend
        self.count = 0

    def velocity(self, prompt: stock.Conditioning, x: Tensor, sigma: float) -> Tensor:
        """The velocity of one prompt, with maps numbered from 0."""
        self.count = 0
        return stock.velocity(self.patched, prompt, None, 1.0, x, sigma)

    def _attend(
        self,
        _attention: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **_kwargs: Any,
    ) -> Tensor:
        if not skip_reshape:
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        q, k = self.look(self.count, q, k)
        self.looks[self.count] = q, k
        scores = q @ k.mT * q.shape[-1] ** -0.5
        maps = (scores if mask is None else scores + mask).softmax(-1)
        maps = self.change(self.count, maps)
        self.seen[self.count] = maps
        self.count += 1
        out = maps @ v
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Control:
    """All settings of a control, for stand-ins of prompts."""

    pack: ModuleType
    family: Family
    cross_until: float = 1.0
    self_until: float = 1.0
    grids: str = "all"
    mapping: Tensor = field(default_factory=lambda: torch.eye(WORDS))
    weight: Tensor = field(default_factory=lambda: torch.ones(WORDS))
    blend: tuple[Tensor, Tensor] | None = None
    threshold: float = 0.3
    blend_sigma: float = math.inf
    blocks: str = "all"

    @property
    def edit(self) -> Any:
        """The edit of a map."""
        return self.pack.kernels.prompt_to_prompt.MapEdit(self.mapping, self.weight)

    def on(self, model: Any) -> Any:
        """A model that is controlled."""
        host = self.pack.nodes.host
        prompts = host.prompt_pairs.Prompts([], [], self.edit, self.blend)
        p2p = host.prompt_to_prompt
        settings = p2p.ControlSettings(
            host.layouts.chosen_blocks(model, self.blocks),
            p2p.sigma_after(model, self.cross_until),
            p2p.sigma_after(model, self.self_until),
            self.grids,
        )
        blend = p2p.BlendSettings(self.threshold, self.blend_sigma)
        return p2p.controlled(model, prompts, settings, blend)

    def written_out(
        self,
        model: Any,
        prompts: tuple[Any, Any],
        x: tuple[Tensor, Tensor],
        sigma: float,
        words: tuple[int, int] = (WORDS, WORDS),
    ) -> Tensor:
        """The target's velocity by whole maps, those of the picture's own kept on all grids.

        Args:
            prompts, x: the target's and the source's.
            words: how many tokens source and target have.
        """
        source = WholeMaps(model)
        source.velocity(prompts[1], x[1], sigma)
        kinds = [name.rsplit(" ", 1) for name in self.family.seen]
        # Lumina's refiners come before its blocks.
        before = len(source.seen) - len(kinds)

        def change(number: int, maps: Tensor) -> Tensor:
            if number < before:
                return maps
            block, kind = kinds[number - before]
            theirs = source.seen[number]
            if not block.startswith(self.blocks.replace("all", "")):
                return maps
            if kind == "self":
                return theirs if self.self_until else maps
            if kind == "cross":
                return self.edit(maps, theirs) if self.cross_until else maps
            assert not self.self_until, "in joint attention queries are exchanged, not maps"
            return self._joint(maps, theirs, words)

        return WholeMaps(model, change).velocity(prompts[0], x[0], sigma)

    def _joint(self, maps: Tensor, source: Tensor, words: tuple[int, int]) -> Tensor:
        first, padded = self.family.text.start, len(self.family.text) > WORDS
        counts = (len(self.family.text),) * 2 if padded else words
        edit = self.edit.padded(*counts, self._padding)
        theirs, ours = (slice(first, first + count) for count in counts)
        tokens = math.prod(self.family.grid)
        # The picture comes next, and after it maybe padding that looks as it does.
        image, shown = (slice(text.stop, text.stop + tokens) for text in (ours, theirs))
        changed, rows = maps.clone(), maps[:, :, image]
        edited = edit(rows[..., ours], source[:, :, shown, theirs])
        edited = edited / edited.sum(-1, keepdim=True).clamp(min=1)
        rest = rows.clone()
        rest[..., ours] = 0
        rest = rest * (1 - edited.sum(-1, keepdim=True)) / rest.sum(-1, keepdim=True)
        rest[..., ours] = edited
        changed[:, :, image] = rest
        return changed

    @property
    def _padding(self) -> str:
        """Only Flux.2 puts padding first."""
        return "left" if self.family.words.start > self.family.text.start else "right"

    def with_the_sources_looks(
        self, model: Any, prompts: tuple[Any, Any], x: tuple[Tensor, Tensor], sigma: float
    ) -> Tensor:
        """The target's velocity where its picture has the source's queries and keys."""
        source = WholeMaps(model)
        source.velocity(prompts[1], x[1], sigma)
        image = self.family.image_of("", "joint")

        def look(number: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            span = slice(image.start, image.stop)
            pairs = zip((q.clone(), k.clone()), source.looks[number], strict=True)
            changed = []
            for own, theirs in pairs:
                own[:, :, span] = theirs[:, :, span]
                changed.append(own)
            return changed[0], changed[1]

        return WholeMaps(model, look=look).velocity(prompts[0], x[0], sigma)


def pair_guider(
    model: Any,
    source: stock.Conditioning,
    target: stock.Conditioning,
    negative: stock.Conditioning | None = None,
    source_guidance: float = 1.0,
    target_guidance: float = 1.0,
    trajectory: Any = None,
) -> Any:
    """A GUIDER from the Prompt-to-Prompt Guider node."""
    optional = {"negative": negative, "trajectory": trajectory}
    wired = {name: thing for name, thing in optional.items() if thing is not None}
    guidances = dict(source_guidance=source_guidance, target_guidance=target_guidance)
    return stock.call(
        "PinpointPromptToPromptGuider",
        **dict(model=model, source=source, target=target, guidance_mode="auto"),
        **guidances,
        **wired,
    )[0]


def swap(first: int = 3) -> Tensor:
    """Words 3 and 4 change places, word 7 is new."""
    mapping = torch.eye(WORDS)
    mapping[:, [first, first + 1]] = mapping[:, [first + 1, first]]
    mapping[:, 7] = 0
    return mapping


def held_on(pack: ModuleType, model: Any, latent: Tensor, sigma: float = SIGMA) -> Any:
    """A trajectory that is at a latent at a noise level."""
    host = pack.nodes.host
    latents = torch.stack([latent, latent, latent * 0.5])
    return host.inversion.Trajectory(
        [max(1.0, 2 * sigma), sigma, 0.0], latents, latent, host.families.name(model)
    )


def prompts_of(family: Family) -> tuple[stock.Conditioning, stock.Conditioning]:
    """The target and the source, with the guidance number that the guider gives."""
    target, source = (stock.with_values(family.prompt(seed), guidance=1.0) for seed in (2, 1))
    return target, source


def asked(
    pack: ModuleType,
    model: Any,
    family: Family,
    x: tuple[Tensor, Tensor],
    prompts: tuple[stock.Conditioning, stock.Conditioning] | None = None,
    **guidance: Any,
) -> Tensor:
    """The target's velocity where a sampler asks for it, the source held at a latent."""
    way = held_on(pack, model, x[1])
    given = dict(trajectory=way, **guidance)
    target, source = prompts or prompts_of(family)
    guider = pair_guider(model, source, target, **given)

    def look(guider: Any, extra_args: dict[str, Any]) -> Tensor:
        denoised = guider(x[0], x[0].new_full((len(x[0]),), SIGMA), **extra_args)
        return (x[0] - denoised) / SIGMA

    # The sampler's own latent is the shape's only.
    return stock.inside(guider, x[0], look)
