"""Attention from outside: who looks at which words, and whose values are seen.

`q`, `k`, `v` are (B, heads, tokens, width), as an attention function gets them. No function here
holds a tokens x tokens map: scores are made for a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import bodies

largest_scores = 2**22
"""Scores held at a time, 16 MB in fp32."""
most_groups = 64
"""Groups of keys that a Triton program has room for; for more of them, torch runs."""


def attention_to(
    q: Tensor, k: Tensor, columns: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """How much each query attends to groups of keys: mean over heads of the softmax over all keys.

    With maps of the same tokens as columns it spreads them along a self-attention: each token takes
    the mean of what it attends to.

    Args:
        q: (B, H, Q, D) queries.
        k: (B, H, K, D) keys; fewer heads than queries are repeated.
        columns: (K, G) or (B, K, G), the weight with which each key counts in each group.
        scale: of the products.
        mask: additive (or boolean, True = seen), broadcastable to (B, H, Q, K), or (B, Q, K).
            A query that sees nothing attends to nothing. With a mask, torch runs.

    Returns:
        (B, Q, G) in fp32. Peak memory grows with Q + K, not with their product.
    """
    columns = columns.float().to(q.device)
    if mask is None and columns.shape[-1] <= most_groups and bodies.triton_runs(q, k, columns):
        from .triton_bodies import attention as triton

        return triton.attention_to(q, k, columns, scale)
    columns = columns[:, None] if columns.ndim == 3 else columns
    parts = softmax_parts(q, k, scale, mask, chunk_of(q, k))
    return torch.cat([(weights @ columns / total).mean(1) for weights, total in parts], 1)


def attention_from(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """How much each of a few queries attends to every key: mean over heads of the softmax.

    Args:
        q, k, scale, mask: as in `attention_to`; the result grows with Q * K, so Q is small.

    Returns:
        (B, Q, K) in fp32.
    """
    if mask is None and bodies.triton_runs(q, k):
        from .triton_bodies import attention as triton

        return triton.attention_from(q, k, scale)
    parts = softmax_parts(q, k, scale, mask, chunk_of(q, k))
    return torch.cat([(weights / total).mean(1) for weights, total in parts], 1)


def chunk_of(q: Tensor, k: Tensor) -> int:
    """For how many queries at a time scores are made."""
    batch, heads, count, _ = q.shape
    return min(count, max(1, largest_scores // (batch * heads * k.shape[-2])))


def softmax_parts(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A softmax over all keys, for `chunk` queries at a time.

    Args:
        q, k, scale, mask: as in `attention_to`.

    Yields:
        (B, H, chunk, K) and (B, H, chunk, 1), whose quotient are the probabilities, in fp32. The
        next step overwrites the first.
    """
    k = repeated(k, q.shape[1]).transpose(-1, -2).float()
    batch, heads, count, _ = q.shape
    # One buffer for all chunks: on a CPU, memory that is freed in turns is not given back.
    buffer = k.new_empty(batch, heads, chunk, k.shape[-1])
    for start in range(0, count, chunk):
        queries = q[:, :, start : start + chunk].float() * scale
        scores = torch.matmul(queries, k, out=buffer[:, :, : queries.shape[2]])
        if mask is not None:
            _mask(scores, mask, start, chunk)
        # A query that sees nothing has no highest score to be set against.
        highest = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = scores.sub_(highest).exp_()
        yield weights, weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def blended_values(values: Tensor, recorded: Tensor, weight: Tensor) -> Tensor:
    """Values moved towards recorded ones: exactly either at weight 0 and 1.

    Args:
        values, recorded: (B, H, L, D); a recording of one row serves all.
        weight: (B or 1, L) in [0, 1], 1 = recorded.
    """
    return torch.lerp(
        values, recorded.to(values).expand_as(values), weight[:, None, :, None].to(values)
    )


def blend_into(values: Tensor, other: Tensor, weight: Tensor) -> None:
    """Move values towards others in place: exactly either at weight 0 and 1.

    Args:
        values, other, weight: as in `blended_values`, of any strides.
    """
    other, weight = other.to(values.device), weight.to(values.device)
    if bodies.triton_runs(values, other, weight):
        from .triton_bodies import blending

        blending.blend_into(values, other, weight)
    else:
        values.copy_(blended_values(values, other, weight))


def confining_bias(
    inside: Tensor, first: int, columns: list[int], own: list[int], shape: tuple[int, int]
) -> Tensor:
    """What to add to scores so that some keys are seen inside a region of the picture only.

    S²Edit's masked attention: weights of a place with mask value m are those of exp(score) m, so
    they stay a softmax. Where the mask is 0 and for queries that are not of the picture the value
    is half of the type's lowest: the weight is exactly 0, and no sum with a score overflows.

    Args:
        inside: (B, P) in [0, 1], the mask on the picture's tokens.
        first: the picture's first query.
        columns: the keys.
        own: queries that see them wherever they are.
        shape: numbers of queries and keys.

    Returns:
        (B, queries, keys), 0 but for the columns.
    """
    lowest = torch.finfo(inside.dtype).min / 2
    column = inside.new_full((len(inside), shape[0]), lowest)
    column[:, first : first + inside.shape[1]] = inside.float().log().clamp(min=lowest)
    column[:, own] = 0
    bias = inside.new_zeros(len(inside), *shape)
    bias[:, :, columns] = column[..., None]
    return bias


def with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An attention mask, of any form that ComfyUI takes, and a bias (B, 1, Q, K) together."""
    if mask is None:
        return bias
    if mask.ndim < 4:
        mask = mask.view(*[1] * (3 - mask.ndim), *mask.shape).unsqueeze(1)
    lowest = torch.finfo(bias.dtype).min / 2
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, lowest)
    return (bias + mask).clamp(min=lowest)


def repeated(k: Tensor, heads: int) -> Tensor:
    """Keys or values with as many heads as the queries have."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def _mask(scores: Tensor, mask: Tensor, start: int, chunk: int) -> None:
    """Apply a mask's rows to a chunk of scores, in place."""
    mask = mask[:, None] if mask.ndim == 3 else mask
    rows = mask if mask.shape[-2] == 1 else mask[..., start : start + chunk, :]
    if rows.dtype == torch.bool:
        scores.masked_fill_(~rows, -torch.inf)
    else:
        scores.add_(rows.float())
