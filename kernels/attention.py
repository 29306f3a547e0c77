"""Attention from outside: who looks at which words, and whose values are seen.

`q`, `k`, `v` are (B, heads, tokens, width), as an attention function gets them. No function here
holds a tokens x tokens map: scores are made for a few queries at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

largest_scores = 2**22
"""Scores held at a time, 16 MB in fp32."""


def attention_to(
    q: Tensor, k: Tensor, columns: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """How much each query attends to groups of keys: mean over heads of the softmax over all keys.

    Args:
        q: (B, H, Q, D) queries.
        k: (B, H, K, D) keys; fewer heads than queries are repeated.
        columns: (K, G) or (B, K, G), the weight with which each key counts in each group.
        scale: of the products.
        mask: additive (or boolean, True = seen), broadcastable to (B, H, Q, K), or (B, Q, K).
            A query that sees nothing attends to nothing.

    Returns:
        (B, Q, G) in fp32. Peak memory grows with Q + K, not with their product.
    """
    k = _repeated(k, q.shape[1]).transpose(-1, -2).float()
    columns = columns.float().to(q.device)
    columns = columns[:, None] if columns.ndim == 3 else columns
    batch, heads, count, _ = q.shape
    chunk = max(1, largest_scores // (batch * heads * k.shape[-1]))
    parts = []
    for start in range(0, count, chunk):
        scores = q[:, :, start : start + chunk].float() * scale @ k
        if mask is not None:
            scores = _masked(scores, mask, start, chunk)
        seen = scores.softmax(-1) @ columns
        if mask is not None:
            seen = seen.masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)
        parts.append(seen.mean(1))
    return torch.cat(parts, 1)


def propagated(q: Tensor, k: Tensor, maps: Tensor, scale: float) -> Tensor:
    """Spread maps along self-attention: each token takes the mean of what it attends to.

    Args:
        q, k: (B, H, L, D) of the same tokens; the softmax runs over these only.
        maps: (B, L, G).
        scale: of the products.

    Returns:
        (B, L, G) in fp32.
    """
    k = _repeated(k, q.shape[1]).transpose(-1, -2).float()
    batch, heads, count, _ = q.shape
    chunk = max(1, largest_scores // (batch * heads * count))
    parts = []
    for start in range(0, count, chunk):
        scores = q[:, :, start : start + chunk].float() * scale @ k
        parts.append((scores.softmax(-1) @ maps.float()[:, None]).mean(1))
    return torch.cat(parts, 1)


def blended_values(values: Tensor, recorded: Tensor, weight: Tensor) -> Tensor:
    """Values moved towards recorded ones: exactly either at weight 0 and 1.

    Args:
        values, recorded: (B, H, L, D); a recording of one row serves all.
        weight: (B or 1, L) in [0, 1], 1 = recorded.
    """
    return torch.lerp(
        values, recorded.to(values).expand_as(values), weight[:, None, :, None].to(values)
    )


def _repeated(k: Tensor, heads: int) -> Tensor:
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def _masked(scores: Tensor, mask: Tensor, start: int, chunk: int) -> Tensor:
    mask = mask[:, None] if mask.ndim == 3 else mask
    rows = mask if mask.shape[-2] == 1 else mask[..., start : start + chunk, :]
    if rows.dtype == torch.bool:
        return scores.masked_fill(~rows, -torch.inf)
    return scores + rows.float()
