"""Attention maps by an online softmax: scores never leave the chip.

Milakov and Gimelshein, 2018; Dao et al., 2022. Exponentials are of base 2, which is what GPUs
compute, so `scale` is a score's times log2(e).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import bodies


def attention_to(q: Tensor, k: Tensor, columns: Tensor, scale: float) -> Tensor:
    """See `kernels.attention.attention_to`.

    Heads run beside each other and the mean is taken of what they leave, (B, H, Q, G): sums that
    many programs add to come out in another order, and rounded otherwise, each time.
    """
    q, k = _multipliable(q), _multipliable(k)
    batch, heads, queries, _ = q.shape
    columns = columns.expand(batch, *columns.shape[-2:])
    found = q.new_empty(batch, heads, queries, columns.shape[2], dtype=torch.float32)
    tile = _tile(q)
    with torch.cuda.device_of(q):
        _attend[(triton.cdiv(queries, tile["block_q"]), batch * heads)](
            *(q, k, columns, found, q.stride(), k.stride(), columns.stride()),
            *(heads, heads // k.shape[1], queries, *columns.shape[1:], q.shape[3]),
            scale * math.log2(math.e),
            steps=triton.cdiv(k.shape[2], tile["block_k"]),
            block_g=_block(columns.shape[2]),
            **tile,
        )
    return found.mean(1)


def attention_from(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """See `kernels.attention.attention_from`.

    Keys are read twice: for each query's highest score and sum of weights, then for the weights.
    """
    q, k = _multipliable(q), _multipliable(k)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    levels, totals = q.new_empty(2, batch, heads, queries, dtype=torch.float32)
    found = q.new_empty(batch, queries, keys, dtype=torch.float32)
    tile = _tile(q)
    blocks, steps = triton.cdiv(queries, tile["block_q"]), triton.cdiv(keys, tile["block_k"])
    strides, scale = (q.stride(), k.stride()), scale * math.log2(math.e)
    sizes = heads, heads // k.shape[1], queries, keys, width
    with torch.cuda.device_of(q):
        _sum_up[(blocks, batch * heads)](
            q, k, levels, totals, *strides, *sizes, scale, steps, **tile
        )
        _share_out[(steps, blocks, batch)](
            q, k, levels, totals, found, *strides, *sizes, scale, **tile
        )
    return found


def _tile(q: Tensor) -> dict[str, Any]:
    """How much of queries and keys a program holds at a time: 64 KB, which all GPUs have."""
    row = _block(q.shape[3]) * q.element_size()
    rows = max(16, min(128, 2**14 // row))
    return {
        "precision": "ieee" if q.dtype == torch.float32 else "tf32",
        "block_q": min(rows, _block(q.shape[2])),
        "block_k": min(rows, 64),
        "block_w": _block(q.shape[3]),
    }


def _block(size: int) -> int:
    """The length of a tile's side: matrices are multiplied in powers of 2 from 16 on."""
    return max(16, triton.next_power_of_2(size))


def _multipliable(t: Tensor) -> Tensor:
    """Triton's interpreter multiplies bfloat16 as if its bits were integers."""
    return t.float() if t.dtype == torch.bfloat16 and bodies.interpreted() else t


@triton.jit
def _rows(
    base: tl.tensor,
    strides: tl.tuple,
    places: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    block: tl.constexpr,
) -> tl.tensor:
    """Rows of a matrix whose last two strides are given; zeros beyond its ends."""
    across = tl.arange(0, block)
    offsets = places[:, None].to(tl.int64) * strides[-2] + across[None, :] * strides[-1]
    inside = (places[:, None] < count) & (across[None, :] < width)
    return tl.load(base + offsets, mask=inside, other=0.0)


@triton.jit
def _scores(
    own: tl.tensor,
    k: tl.tensor,
    k_strides: tl.tuple,
    places: tl.tensor,
    keys: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    precision: tl.constexpr,
    block_w: tl.constexpr,
) -> tl.tensor:
    """Scores of some queries and keys, -inf beyond the last key."""
    seen = _rows(k, k_strides, places, keys, width, block_w)
    scores = tl.dot(own, tl.trans(seen), input_precision=precision) * scale
    return tl.where(places[None, :] < keys, scores, float("-inf"))


@triton.jit
def _level(highest: tl.tensor) -> tl.tensor:
    """What scores are set against: the highest, if that is finite."""
    return tl.where(highest == float("-inf"), 0.0, tl.minimum(highest, 3.4028234e38))


@triton.jit
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    columns: tl.tensor,
    found: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    column_strides: tl.tuple,
    heads: tl.constexpr,
    repeats: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    steps: tl.constexpr,
    precision: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
    block_g: tl.constexpr,
) -> None:
    """What some queries of one head attend to."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    q += batch * q_strides[0] + head * q_strides[1]
    k += batch * k_strides[0] + head // repeats * k_strides[1]
    columns += batch * column_strides[0]
    rows = tl.program_id(0) * block_q + tl.arange(0, block_q)
    own = _rows(q, q_strides, rows, queries, width, block_w)
    highest = tl.full((block_q,), float("-inf"), tl.float32)
    total = tl.zeros((block_q,), tl.float32)
    sums = tl.zeros((block_q, block_g), tl.float32)
    for step in range(steps):
        places = step * block_k + tl.arange(0, block_k)
        scores = _scores(own, k, k_strides, places, keys, width, scale, precision, block_w)
        shares = _rows(columns, column_strides, places, keys, groups, block_g)
        rising = tl.maximum(highest, tl.max(scores, 1))
        level = _level(rising)
        weights = tl.exp2(scores - level[:, None])
        fading = tl.exp2(highest - level)
        total = total * fading + tl.sum(weights, 1)
        sums = sums * fading[:, None] + tl.dot(weights, shares, input_precision="ieee")
        highest = rising
    means = sums / tl.where(total == 0, 1.0, total)[:, None]
    across = tl.arange(0, block_g)
    targets = found + (plane * queries + rows[:, None]) * groups + across[None, :]
    tl.store(targets, means, mask=(rows[:, None] < queries) & (across[None, :] < groups))


@triton.jit
def _sum_up(
    q: tl.tensor,
    k: tl.tensor,
    levels: tl.tensor,
    totals: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    heads: tl.constexpr,
    repeats: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    steps: tl.constexpr,
    precision: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """The highest score and the sum of weights of some queries of one head."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    q += batch * q_strides[0] + head * q_strides[1]
    k += batch * k_strides[0] + head // repeats * k_strides[1]
    rows = tl.program_id(0) * block_q + tl.arange(0, block_q)
    own = _rows(q, q_strides, rows, queries, width, block_w)
    level = tl.zeros((block_q,), tl.float32)
    highest = tl.full((block_q,), float("-inf"), tl.float32)
    total = tl.zeros((block_q,), tl.float32)
    for step in range(steps):
        places = step * block_k + tl.arange(0, block_k)
        scores = _scores(own, k, k_strides, places, keys, width, scale, precision, block_w)
        rising = tl.maximum(highest, tl.max(scores, 1))
        level = _level(rising)
        total = total * tl.exp2(highest - level) + tl.sum(tl.exp2(scores - level[:, None]), 1)
        highest = rising
    tl.store(levels + plane * queries + rows, level, mask=rows < queries)
    total = tl.where(total == 0, 1.0, total)
    tl.store(totals + plane * queries + rows, total, mask=rows < queries)


@triton.jit
def _share_out(
    q: tl.tensor,
    k: tl.tensor,
    levels: tl.tensor,
    totals: tl.tensor,
    found: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    heads: tl.constexpr,
    repeats: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    precision: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """The mean over heads of what some queries pay to some keys."""
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * block_q + tl.arange(0, block_q)
    places = tl.program_id(0) * block_k + tl.arange(0, block_k)
    sums = tl.zeros((block_q, block_k), tl.float32)
    for head in range(heads):
        own_q = q + batch * q_strides[0] + head * q_strides[1]
        own_k = k + batch * k_strides[0] + head // repeats * k_strides[1]
        own = _rows(own_q, q_strides, rows, queries, width, block_w)
        scores = _scores(own, own_k, k_strides, places, keys, width, scale, precision, block_w)
        of_head = (batch * heads + head) * queries + rows
        level = tl.load(levels + of_head, mask=rows < queries, other=0.0)
        total = tl.load(totals + of_head, mask=rows < queries, other=1.0)
        sums += tl.exp2(scores - level[:, None]) / total[:, None]
    targets = found + (batch * queries + rows[:, None]) * keys + places[None, :]
    inside = (rows[:, None] < queries) & (places[None, :] < keys)
    tl.store(targets, sums / heads, mask=inside)
