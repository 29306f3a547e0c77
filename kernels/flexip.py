"""FlexIP's adapter (arXiv 2504.07405): what it reads from a subject and a prompt, and its gate.

The paper's figure gives the parts and how they are joined; depths, widths and token counts are not
published and are settings here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mode = Literal["literal", "linear"]


@dataclass(frozen=True)
class FlexIPSizes:
    """How large an adapter is.

    Attributes:
        low_width, high_width: of the image encoders' patch features and embedding.
        text_width: of the prompt's tokens as the model is given them.
        width: of the adapter's own tokens.
        blocks: names of the model's blocks -> width of their attention.
        head_width: of the adapter's own attention.
        detail_tokens, global_tokens: how many of each a reference gives.
        detail_depth, global_depth, text_depth: blocks of each of the three stacks.
    """

    low_width: int
    high_width: int
    text_width: int
    width: int = 768
    blocks: dict[str, int] = field(default_factory=dict)
    head_width: int = 64
    detail_tokens: int = 16
    global_tokens: int = 4
    detail_depth: int = 4
    global_depth: int = 2
    text_depth: int = 2


class Gated(NamedTuple):
    """What one branch's tokens are to a block: (B, T, width) keys and values."""

    keys: Tensor
    values: Tensor


class Reading(nn.Module):
    """Tokens that read a memory, and are changed by what they read (pre-norm, as in transformers).

    (B, Q, width) and (B, M, width) -> (B, Q, width).
    """

    def __init__(self, width: int, head_width: int, operations: Any = nn):
        super().__init__()
        self.heads = width // head_width
        self.norm = operations.LayerNorm(width)
        self.norm_memory = operations.LayerNorm(width)
        self.to_q = operations.Linear(width, width, bias=False)
        self.to_kv = operations.Linear(width, 2 * width, bias=False)
        self.to_out = operations.Linear(width, width, bias=False)
        self.norm_mlp = operations.LayerNorm(width)
        self.widen = operations.Linear(width, 4 * width)
        self.narrow = operations.Linear(4 * width, width)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Read, then think it over."""
        keys, values = self.to_kv(self.norm_memory(memory)).chunk(2, -1)
        q, k, v = (in_heads(t, self.heads) for t in (self.to_q(self.norm(tokens)), keys, values))
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.to_out(read)
        return tokens + self.narrow(F.gelu(self.widen(self.norm_mlp(tokens))))


class Stack(nn.Module):
    """Several readings of the same memory, and a last norm."""

    def __init__(self, width: int, head_width: int, depth: int, operations: Any = nn):
        super().__init__()
        self.readings = nn.ModuleList(Reading(width, head_width, operations) for _ in range(depth))
        self.norm = operations.LayerNorm(width)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """(B, Q, width) and (B, M, width) -> (B, Q, width)."""
        for reading in self.readings:
            tokens = reading(tokens, memory)
        return self.norm(tokens)


class FlexIP(nn.Module):
    """Preservation adapter, personalization adapter, and the attention they are read by.

    Args:
        operations: layers to be built of, as ComfyUI's `comfy.ops.manual_cast`.
    """

    def __init__(self, sizes: FlexIPSizes, operations: Any = nn):
        super().__init__()
        self.sizes = sizes
        width, head_width = sizes.width, sizes.head_width
        self.low = operations.Linear(sizes.low_width, width)
        self.high = operations.Linear(sizes.high_width, sizes.global_tokens * width)
        self.text = operations.Linear(sizes.text_width, width)
        self.queries = nn.Parameter(torch.randn(sizes.detail_tokens, width) / width**0.5)
        self.detail = Stack(width, head_width, sizes.detail_depth, operations)
        self.overall = Stack(width, head_width, sizes.global_depth, operations)
        self.personal = Stack(width, head_width, sizes.text_depth, operations)
        self.to_k, self.to_v = (
            nn.ModuleDict(
                {n: operations.Linear(width, w, bias=False) for n, w in sizes.blocks.items()}
            )
            for _ in range(2)
        )

    def silence(self) -> None:
        """Let blocks read nothing from the tokens, so that training starts at the model's own."""
        for layer in self.to_v.values():
            nn.init.zeros_(layer.weight)

    def preservation(self, low: Tensor, high: Tensor) -> Tensor:
        """Detail and global tokens of each subject.

        Args:
            low: (B, P, low_width), patch features.
            high: (B, high_width), the embedding of the whole picture.

        Returns:
            (B, detail_tokens + global_tokens, width).
        """
        memory = self.low(low)
        queries = self.queries.to(memory).expand(len(low), -1, -1)
        return torch.cat(
            [self.detail(queries, memory), self.overall(self._summary(high), memory)], 1
        )

    def personalization(self, text: Tensor, high: Tensor) -> Tensor:
        """The prompt's tokens, resampled against the subject.

        Args:
            text: (B, L, text_width).
            high: (B, R, high_width), of R references.

        Returns:
            (B, L, width).
        """
        return self.personal(
            self.text(text),
            self._summary(high.flatten(0, 1)).reshape(len(high), -1, self.sizes.width),
        )

    def keys_values(self, block: str, tokens: Tensor) -> Gated:
        """What a block's attention looks at: (B, T, width) -> (B, T, the block's width) each."""
        return Gated(self.to_k[block](tokens), self.to_v[block](tokens))

    def forward(self, low: Tensor, high: Tensor, text: Tensor) -> dict[str, tuple[Gated, Gated]]:
        """All blocks' keys and values at once, for training: one reference for each row.

        Args:
            low: (B, P, low_width).
            high: (B, high_width).
            text: (B, L, text_width).

        Returns:
            By block: of the preservation and of the personalization tokens.
        """
        kept = self.preservation(low, high)
        free = self.personalization(text, high[:, None])
        return {
            block: (self.keys_values(block, kept), self.keys_values(block, free))
            for block in self.sizes.blocks
        }

    def _summary(self, high: Tensor) -> Tensor:
        return self.high(high).unflatten(1, (self.sizes.global_tokens, -1))


def in_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, T, heads * width) -> (B, heads, T, width)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def gated_attention(
    q: Tensor,
    branches: Sequence[Gated],
    gains: Sequence[float | Tensor],
    mode: Mode,
) -> Tensor:
    """Attention to gated tokens, to be added to a block's own.

    Literal is the paper's figure: tokens are scaled and joined, then read by one attention. As keys
    and values are linear in the tokens, a gain acts on what is read and on how much it is looked
    at. Linear adds one attention for each branch, each times its gain.

    Args:
        q: (B, heads, Q, width), the picture's queries.
        branches: keys and values, (B or 1, T, heads * width).
        gains: of each branch, numbers or (B,).

    Returns:
        (B, Q, heads * width).
    """
    heads = q.shape[1]
    gains = [g.view(-1, 1, 1).to(q) if isinstance(g, Tensor) else g for g in gains]
    if mode == "literal":
        scaled = [(b.keys * g, b.values * g) for b, g in zip(branches, gains, strict=True)]
        rows = max(len(keys) for keys, _ in scaled)
        keys, values = (
            torch.cat([part.expand(rows, -1, -1) for part in parts], 1)
            for parts in zip(*scaled, strict=True)
        )
        return _attended(q, keys, values, heads)
    read = [
        g * _attended(q, branch.keys, branch.values, heads)
        for branch, g in zip(branches, gains, strict=True)
    ]
    return torch.stack(read).sum(0)


def _attended(q: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    k, v = (in_heads(t, heads).expand(len(q), -1, -1, -1) for t in (keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
