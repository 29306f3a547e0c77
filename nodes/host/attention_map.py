"""Flux-Sculptor's prompt-aligned locator: where does a picture look at the words of a phrase?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels import attention as attending
from ...kernels import flow, masks
from . import layouts, phrases, tap
from .guiding import Conditioning
from .layouts import Block, Place

longest_clause = 5
"""Words; a longer one is taken for a sentence."""


@dataclass(frozen=True)
class GatherSettings:
    """Where attention is read.

    Attributes:
        blocks: transformer blocks.
        heads: indices of attention heads, empty = all.
        highest, lowest: sigmas of the first and the last sample, in (0, 1).
        samples: model calls; each has its own sigma and noise.
        propagation: times that a map is spread along the picture's own attention.
        seed: noise k is drawn with seed + 100 k; one noise serves all pictures of a batch.
    """

    blocks: frozenset[Block]
    heads: tuple[int, ...] = ()
    highest: float = 0.85
    lowest: float = 0.6
    samples: int = 4
    propagation: int = 0
    seed: int = 0

    def levels(self) -> list[float]:
        """The sigma of each sample."""
        return torch.linspace(self.highest, self.lowest, self.samples).tolist()


class _Gatherer:
    """Sums up the maps of all chosen blocks, grid by grid; nothing larger than the maps is held."""

    def __init__(self, columns: Tensor, settings: GatherSettings, padding: str):
        self.columns, self.settings, self.padding = columns, settings, padding
        self.sums: dict[tuple[int, int, int], Tensor] = {}
        self._own: tuple[Block, tuple[Tensor, Tensor]] | None = None

    def look(self, attention: tap.Attention) -> None:
        """Handler for `tap.observing`."""
        place = attention.place
        if place.block not in self.settings.blocks:
            return
        heads = attention.q.shape[1]
        q, k = self._heads(attention.q, heads), self._heads(attention.k, heads)
        image = q[:, :, place.image]
        if place.kind != "cross":
            # A cross-attention is spread along the self-attention of its block, which came before.
            self._own = place.block, (image, k[:, :, place.image])
        if place.text is None:
            return
        columns = self._on_keys(k.shape[2], place, attention.call)
        mask = attention.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., place.image, :]
        maps = attending.attention_to(image, k, columns, attention.scale, mask)
        if self._own is not None and self._own[0] == place.block:
            for _ in range(self.settings.propagation):
                maps = attending.attention_to(*self._own[1], maps, attention.scale)
        self.sums[place.grid] = self.sums.get(place.grid, 0) + maps

    def _heads(self, t: Tensor, count: int) -> Tensor:
        """The chosen heads of queries or keys, keys repeated to the count of the queries' heads."""
        chosen = self.settings.heads
        if not chosen:
            return t
        if chosen[-1] >= count:
            raise ValueError(
                f"heads names head {chosen[-1]}, but the model's attention has heads 0-{count - 1}"
            )
        return t.repeat_interleave(count // t.shape[1], 1)[:, list(chosen)]

    def _on_keys(self, keys: int, place: Place, call: tap.ModelCall) -> Tensor:
        """The prompt's columns laid over an attention's keys."""
        text = place.text
        assert text is not None
        given, length = self.columns.shape[-2], text.stop - text.start
        start = text.start + (length - given if self.padding == "left" else 0)
        return F.pad(self.columns, (0, 0, start, keys - start - given))

    def maps(self) -> Tensor:
        """(B, G, rows, columns) on the finest grid, mean over frames, each grid counting alike."""
        finest = max(self.sums, key=lambda grid: grid[1] * grid[2])
        total = 0
        for (frames, *size), maps in self.sums.items():
            framed = maps.movedim(1, 2).unflatten(2, (frames, *size)).mean(2)
            framed = framed / framed.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
            total = total + F.interpolate(framed, finest[1:], mode="bilinear", align_corners=False)
        return total


class AttentionProbe(comfy.samplers.Sampler):
    """A sampler that only calls the model on a noised picture, for a tap to look at."""

    def __init__(self, settings: GatherSettings, progress: Callable[[], None]):
        self.settings, self.progress = settings, progress

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
        """ComfyUI's sampler interface; returns the latent as it came."""
        sampling = model_wrap.inner_model.model_sampling
        straight = isinstance(sampling, comfy.model_sampling.CONST)
        for k, level in enumerate(self.settings.levels()):
            comfy.model_management.throw_exception_if_processing_interrupted()
            generator = torch.Generator().manual_seed(self.settings.seed + 100 * k)
            drawn = flow.draw_noise((1, *latent_image.shape[1:]), [generator], latent_image)
            # Models with added noise know a noise level by its ratio to the picture.
            ratio = level / max(1 - level, 1e-9)
            sigma = level if straight else min(ratio, float(sampling.sigma_max))
            rows = latent_image.new_full((len(latent_image),), sigma)
            shaped = rows.view(-1, *[1] * (latent_image.ndim - 1))
            x = sampling.noise_scaling(shaped, drawn.expand_as(latent_image), latent_image)
            model_wrap(x, rows, **extra_args)
            self.progress()
        return latent_image


def gathered(
    model: ModelPatcher,
    prompt: Conditioning,
    columns: Tensor,
    latent: Tensor,
    settings: GatherSettings,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """How much each place of a picture looks at groups of a prompt's tokens.

    Args:
        model: any family of the tap's table.
        prompt: its conditioning.
        columns: (T, G) or (B, T, G), the weight of each of the prompt's tokens in each group.
        latent: (B, C, [T,] H, W) as it comes on a LATENT wire.
        settings: see `GatherSettings`.
        progress: called after each model call.

    Returns:
        (B, G, rows, columns) on the grid of the model's image tokens, fp32, on the CPU.

    Raises:
        ValueError: none of the chosen blocks' attentions was reached.
    """
    gatherer = _Gatherer(columns, settings, layouts.layout_of(model).text_padding)
    tapped = tap.tapped(model, tap.observing(gatherer.look))
    probe(tapped, prompt, latent, settings, progress)
    if not gatherer.sums:
        raise ValueError(
            "blocks names only blocks in which the picture does not attend to the prompt, or "
            "another node replaces their attention: choose others"
        )
    maps = gatherer.maps().cpu()
    if not torch.isfinite(maps).all():
        raise ValueError(
            "the model's attention holds values that are not finite: check the model's weights and "
            "precision"
        )
    return maps


def probe(
    model: ModelPatcher,
    prompt: Conditioning,
    latent: Tensor,
    settings: GatherSettings,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Call a model on a noised picture, once for each sample, for its taps to look at."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    guider.set_cfg(1.0)
    guider.sample(
        torch.zeros_like(latent),
        latent,
        AttentionProbe(settings, progress),
        torch.tensor([settings.highest, 0.0]),
        seed=settings.seed,
        disable_pbar=True,
    )


def phrase_heat(maps: Tensor, low: float, high: float, contrast: float) -> Tensor:
    """Heat of each phrase from gathered maps whose last group is the rest of the prompt.

    Args:
        maps: (B, G + 1, rows, columns).
        low, high: quantiles that each map is clipped to.
        contrast: how much of the rest's heat is taken away, in [0, 1].

    Returns:
        (B, G, rows, columns) in [0, 1].
    """
    heat = masks.normalized(maps.flatten(0, 1), low, high).view_as(maps)
    phrases, rest = heat[:, :-1], heat[:, -1:]
    if contrast == 0:
        return phrases
    left = (phrases - contrast * rest).clamp(min=0)
    return left / left.amax((2, 3), keepdim=True).clamp(min=1e-8)


@dataclass(frozen=True)
class Request:
    """Phrases to be found with one prompt.

    Attributes:
        text: the prompt.
        wanted: parts of it.
        prompt_name, phrases_name: of the inputs, for errors.
    """

    text: str
    wanted: list[str]
    prompt_name: str
    phrases_name: str


def located(
    model: ModelPatcher,
    clip: Any,
    requests: list[Request],
    latent: Tensor,
    settings: GatherSettings,
) -> list[Tensor]:
    """Maps of each request's phrases and, last, of the rest of its prompt, see `gathered`."""
    encoded = [
        phrases.encode_with_positions(
            clip, request.text, request.wanted, request.prompt_name, request.phrases_name
        )
        for request in requests
    ]
    progress = comfy.utils.ProgressBar(settings.samples * len(requests))
    maps = []
    for request, prompt in zip(requests, encoded, strict=True):
        columns, conditioning = phrase_columns(prompt, request.wanted), prompt.conditioning
        maps.append(
            gathered(model, conditioning, columns, latent, settings, lambda: progress.update(1))
        )
    return maps


def phrase_columns(prompt: phrases.EncodedPrompt, wanted: list[str]) -> Tensor:
    """(T, G + 1): each phrase's tokens, and in the last column the prompt's other words."""
    tokens = prompt.conditioning[0][0].shape[1]
    columns = torch.zeros(tokens, len(wanted) + 1)
    others = set(prompt.words)
    for group, phrase in enumerate(wanted):
        positions = prompt.positions[phrase]
        columns[positions, group] = 1 / len(positions)
        others -= set(positions)
    if others:
        columns[sorted(others), -1] = 1 / len(others)
    return columns


@dataclass(frozen=True)
class MaskShape:
    """How heat becomes a mask.

    Attributes:
        threshold: heat from which a place is inside.
        softness: how gradually the soft mask rises around the threshold.
        smallest: parts with fewer image tokens are dropped.
        dilation: window of the maximum that grows the heat, in latent cells.
        soft_edge: standard deviation of the blur of the soft mask, in latent cells.
    """

    threshold: float
    softness: float
    smallest: int
    dilation: int
    soft_edge: float

    def cleaned(self, heat: Tensor, cells: tuple[int, int]) -> Tensor:
        """(B, H, W) heat without specks, on the latent's grid, dilated."""
        kept = masks.without_specks(heat, self.threshold, self.smallest)
        return masks.dilated(masks.resized(kept, *cells), self.dilation)

    def soft(self, heat: Tensor) -> Tensor:
        """The soft mask of cleaned heat."""
        mask = masks.contrasted(heat, self.threshold, self.softness)
        return masks.softened(mask, self.soft_edge)

    def hard(self, heat: Tensor) -> Tensor:
        """The mask of cleaned heat, 0 or 1."""
        return masks.contrasted(heat, self.threshold, 0.0)


def requests_for(source: str, target: str, added: str, removed: str) -> list[Request]:
    """Which phrases to find with which prompt.

    Raises:
        ValueError: there is nothing to find.
    """
    wanted_removed, wanted_added = (phrases.split_phrases(text) for text in (removed, added))
    if not wanted_added and not wanted_removed:
        wanted_removed, wanted_added = _changed(source, target)
    if not wanted_added and not wanted_removed:
        raise ValueError(
            "source_prompt and target_prompt say the same, so there is nothing to locate: change "
            "the target prompt, or name phrases in added or removed"
        )
    given = (
        Request(target, wanted_added, "target_prompt", "added"),
        Request(source, wanted_removed, "source_prompt", "removed"),
    )
    return [request for request in given if request.wanted]


def _changed(source: str, target: str) -> tuple[list[str], list[str]]:
    """The clauses in which two prompts differ, or only the changed words if these are sentences.

    A clause such as "red hat" brings its noun along; a whole sentence would bring the picture.
    """
    clauses = phrases.changed_phrases(source, target, whole=True)
    if all(len(clause.split()) <= longest_clause for side in clauses for clause in side):
        return clauses
    return phrases.changed_phrases(source, target)


def chosen_heads(text: str) -> tuple[int, ...]:
    """Attention heads that a widget's text names, empty for all.

    Raises:
        ValueError: the text is neither "all" nor numbers and ranges.
    """
    if text.strip().lower() in ("", "all"):
        return ()
    try:
        bounds = [[int(b) for b in part.split("-", 1)] for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"heads is '{text}': write all, or numbers and ranges such as 0, 4-7"
        ) from None
    for first, *last in bounds:
        if last and last[0] < first:
            raise ValueError(f"heads has {first}-{last[0]}, which falls: write {last[0]}-{first}")
    return tuple(sorted({head for b in bounds for head in range(b[0], b[-1] + 1)}))
