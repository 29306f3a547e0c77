"""A step of an edit in one pass: differences, their mean over noises, mask and Euler step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

_block = 1024


def moved(
    delta: Tensor,
    velocities: Iterable[tuple[Tensor, Tensor, int]],
    mask: Tensor,
    step: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.flow.moved`."""
    start, weight = delta.flatten(2), mask.expand_as(delta).flatten(2)
    batch, channels, cells = start.shape
    result, difference = delta.new_empty(2, *start.shape)
    sums = start.new_empty(start.shape, dtype=torch.float32)
    done = 0
    for target, source, draws in velocities:
        moving, still, first = target.flatten(2), source.flatten(2), done == 0
        done += draws
        with torch.cuda.device_of(delta):
            _move[(triton.cdiv(cells, _block), batch * channels)](
                *(start, weight, moving, still, sums, result, difference),
                *(start.stride(), weight.stride(), moving.stride(), still.stride()),
                *(batch, channels, cells, float(count), float(step)),
                draws=draws,
                first=first,
                last=done == count,
                block=_block,
            )
    return result.view_as(delta), difference.view_as(delta)


@triton.jit
def _place(
    base: tl.tensor, strides: tl.tuple, row: tl.tensor, channel: tl.tensor, cells: tl.tensor
) -> tl.tensor:
    return base + row * strides[0] + channel * strides[1] + cells * strides[2]


@triton.jit
def _move(
    delta: tl.tensor,
    mask: tl.tensor,
    target: tl.tensor,
    source: tl.tensor,
    sums: tl.tensor,
    result: tl.tensor,
    difference: tl.tensor,
    delta_strides: tl.tuple,
    mask_strides: tl.tuple,
    target_strides: tl.tuple,
    source_strides: tl.tuple,
    batch: tl.tensor,
    channels: tl.tensor,
    cells: tl.tensor,
    count: tl.tensor,
    step: tl.tensor,
    draws: tl.constexpr,
    first: tl.constexpr,
    last: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Some cells of one channel: sums of one call's differences, and after the last the step."""
    plane = tl.program_id(1).to(tl.int64)
    row, channel = plane // channels, plane % channels
    places = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    inside = places < cells
    flat = plane * cells + places
    total = tl.zeros((block,), tl.float32)
    if not first:
        total += tl.load(sums + flat, mask=inside)
    for draw in range(draws):
        of_draw = draw * batch + row
        moving = tl.load(_place(target, target_strides, of_draw, channel, places), mask=inside)
        still = tl.load(_place(source, source_strides, of_draw, channel, places), mask=inside)
        total += moving.to(tl.float32) - still.to(tl.float32)
    if last:
        mean = total / count
        start = tl.load(_place(delta, delta_strides, row, channel, places), mask=inside)
        weight = tl.load(_place(mask, mask_strides, row, channel, places), mask=inside)
        end = start.to(tl.float32) + step * (weight.to(tl.float32) * mean)
        tl.store(difference + flat, mean.to(difference.dtype.element_ty), mask=inside)
        tl.store(result + flat, end.to(result.dtype.element_ty), mask=inside)
    else:
        tl.store(sums + flat, total, mask=inside)
