"""Attention values blended where they lie, whatever the strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def blend_into(values: Tensor, other: Tensor, weight: Tensor) -> None:
    """See `kernels.attention.blend_into`."""
    batch, heads, length, width = values.shape
    other, weight = other.expand_as(values), weight.expand(batch, length)
    across = triton.next_power_of_2(width)
    rows = max(1, 4096 // across)
    with torch.cuda.device_of(values):
        _blend[(triton.cdiv(length, rows), batch * heads)](
            *(values, other, weight, values.stride(), other.stride(), weight.stride()),
            *(heads, length, width),
            block_l=rows,
            block_w=across,
        )


@triton.jit
def _blend(
    values: tl.tensor,
    other: tl.tensor,
    weight: tl.tensor,
    strides: tl.tuple,
    other_strides: tl.tuple,
    weight_strides: tl.tuple,
    heads: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    block_l: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """Some tokens of one head, by torch's formula for lerp."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    tokens = (tl.program_id(0) * block_l + tl.arange(0, block_l)).to(tl.int64)[:, None]
    across = tl.arange(0, block_w)[None, :]
    inside = (tokens < length) & (across < width)
    targets = values + batch * strides[0] + head * strides[1]
    targets += tokens * strides[2] + across * strides[3]
    others = other + batch * other_strides[0] + head * other_strides[1]
    others += tokens * other_strides[2] + across * other_strides[3]
    weights = weight + batch * weight_strides[0] + tokens * weight_strides[1]
    dtype = values.dtype.element_ty
    a = tl.load(targets, mask=inside).to(tl.float32)
    # Rounded to the values' dtype first, as torch's body does.
    b = tl.load(others, mask=inside).to(dtype).to(tl.float32)
    w = tl.load(weights, mask=tokens < length).to(dtype).to(tl.float32)
    blended = tl.where(w < 0.5, a + w * (b - a), b - (b - a) * (1 - w))
    tl.store(targets, blended.to(dtype), mask=inside)
