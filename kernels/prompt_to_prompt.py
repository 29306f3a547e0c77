"""Prompt-to-Prompt: attention maps of one prompt made of another's, and the blend by a word's map.

Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross-Attention Control", 2022
(arXiv 2208.01626), and its published program (github.com/google/prompt-to-prompt).

`q`, `k`, `v` are (B, heads, tokens, width). No function here holds a tokens x tokens map.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention

Side = Literal["left", "right"]


def token_mapping(
    source: Sequence[Hashable], target: Sequence[Hashable], *, swapped: bool
) -> Tensor:
    """Which of a source prompt's tokens each of a target prompt's tokens stands for.

    Args:
        source, target: tokens, equal where they say the same.
        swapped: whether tokens that stand in place of others stand for them ("replace"); otherwise
            only tokens that both prompts have do ("refine").

    Returns:
        (S, T). A token that both have is 1 at its counterpart. Of n tokens that m others replace,
        each is shared out among the m, 1/m to each, or one to one if n = m. Columns of new tokens
        are 0.
    """
    mapping = torch.zeros(len(source), len(target))
    matcher = SequenceMatcher(None, source, target, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal" or (swapped and tag == "replace" and b - a == d - c):
            mapping[range(a, b), range(c, d)] = 1
        elif swapped and tag == "replace":
            mapping[a:b, c:d] = 1 / (d - c)
    return mapping


@dataclass(frozen=True)
class MapEdit:
    """How a target prompt's maps are made of the source's and its own.

    Attributes:
        mapping: (S, T), see `token_mapping`; a target token whose column is 0 keeps its own map.
        weight: (T,), what each target token's map is multiplied by.
    """

    mapping: Tensor
    weight: Tensor

    def __call__(self, own: Tensor, source: Tensor) -> Tensor:
        """Edited probabilities (..., T) from the target's own (..., T) and the source's (..., S).

        A token that its own attention does not see at all, as a mask forbids it, stays unseen.
        """
        taken = self.mapping.any(0)
        edited = torch.where(taken, source @ self.mapping, own) * self.weight
        return edited.masked_fill_(own == 0, 0.0)

    def to(self, like: Tensor) -> MapEdit:
        """On another tensor's device, in fp32."""
        return MapEdit(self.mapping.to(like.device), self.weight.to(like.device))

    def repeated(self, source: int, target: int) -> MapEdit:
        """For prompts that stand several times in a row, as ComfyUI repeats them to one length."""
        if source == target == 1:
            return self
        return MapEdit(self.mapping.repeat(source, target) / target, self.weight.repeat(target))

    def padded(self, source: int, target: int, side: Side) -> MapEdit:
        """For prompts that a model lengthens to (source, target) tokens: padding to padding."""
        more = (source - self.mapping.shape[0], target - self.mapping.shape[1])
        if more == (0, 0):
            return self
        corner = torch.eye(*more)
        blocks = (corner, self.mapping) if side == "left" else (self.mapping, corner)
        ones = torch.ones(more[1])
        weight = (ones, self.weight) if side == "left" else (self.weight, ones)
        return MapEdit(torch.block_diag(*blocks), torch.cat(weight))


class Looks(NamedTuple):
    """What an attention's probabilities are made of.

    Attributes:
        q, k: (B, H, Q, D), (B, H or fewer, K, D).
        mask: as in `attention.attention_to`, or None.
        text: the prompt's tokens among the keys.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    text: slice


def edited_attention(own: Looks, source: Looks, v: Tensor, edit: MapEdit, scale: float) -> Tensor:
    """Attention with the prompt's part of each probability map edited.

    Where the keys are the prompt's alone (cross-attention) the maps are used as they come, as
    published. Where there are others (joint attention, ours) these are scaled so that each query's
    probabilities still sum to 1; a prompt whose part alone is more is scaled to 1.

    Args:
        own, source: of the target's and the source's queries, of which there are equally many.
        v: the target's values, (B, H or fewer, K, D).
        edit: for all keys in `own.text` and `source.text`.

    Returns:
        (B, H, Q, D) in fp32.
    """
    heads = own.q.shape[1]
    values = attention.repeated(v, heads).float()
    chunk = min(attention.chunk_of(looks.q, looks.k) for looks in (own, source))
    parts = (
        attention.softmax_parts(looks.q, looks.k, scale, looks.mask, chunk)
        for looks in (own, source)
    )
    joint = own.text.stop - own.text.start < own.k.shape[2]
    outputs = []
    for (weights, total), (source_weights, source_total) in zip(*parts, strict=True):
        maps = weights.div_(total)
        words = maps[..., own.text]
        edited = edit(words, source_weights[..., source.text] / source_total)
        if joint:
            share = edited.sum(-1, keepdim=True)
            rest = (1 - words.sum(-1, keepdim=True)).clamp(min=torch.finfo(maps.dtype).eps)
            maps *= (1 - share).clamp(min=0) / rest
            edited = edited / share.clamp(min=1)
        maps[..., own.text] = edited
        outputs.append(maps @ values)
    return torch.cat(outputs, 2)


def word_area(heat: Tensor, size: tuple[int, ...], threshold: float) -> Tensor:
    """Where a picture looks at a word: LocalBlend's mask.

    Args:
        heat: (B, frames, rows, columns), mean attention to the word.
        size: of a latent's places, (H, W) or (T, H, W).
        threshold: part of the highest heat that is inside.

    Returns:
        (B, 1, *size), True inside.
    """
    grown = F.max_pool2d(heat.float(), 3, stride=1, padding=1)
    cells = grown[:, None] if len(size) == 3 else grown.mean(1, keepdim=True)
    fitted = F.interpolate(cells, size, mode="nearest-exact")
    highest = fitted.flatten(1).amax(1).clamp(min=1e-12)
    return fitted > threshold * highest.view(-1, *[1] * (fitted.ndim - 1))
