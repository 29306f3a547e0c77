"""Mask statistics that one pass over the velocities gives."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_block = 256


def velocity_difference(target: Tensor, source: Tensor) -> Tensor:
    """See `kernels.masks.velocity_difference`; the mean is rounded to the inputs' dtype once."""
    batch, (height, width) = len(target), target.shape[-2:]
    target, source = target.flatten(-2).flatten(1, -2), source.flatten(-2).flatten(1, -2)
    layers, cells = target.shape[1:]
    found = target.new_empty(batch, cells)
    with torch.cuda.device_of(target):
        _mean_difference[(triton.cdiv(cells, _block), batch)](
            *(target, source, found, target.stride(), source.stride(), cells),
            layers=layers,
            block=_block,
        )
    return found.view(batch, height, width)


@triton.jit
def _mean_difference(
    target: tl.tensor,
    source: tl.tensor,
    found: tl.tensor,
    target_strides: tl.tuple,
    source_strides: tl.tuple,
    cells: tl.tensor,
    layers: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Some cells of one picture, over its channels and frames."""
    row = tl.program_id(1).to(tl.int64)
    places = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    inside = places < cells
    target += row * target_strides[0] + places * target_strides[2]
    source += row * source_strides[0] + places * source_strides[2]
    total = tl.zeros((block,), tl.float32)
    for layer in range(layers):
        moving = tl.load(target + layer * target_strides[1], mask=inside).to(tl.float32)
        still = tl.load(source + layer * source_strides[1], mask=inside).to(tl.float32)
        total += tl.abs(moving - still)
    mean = (total / layers).to(found.dtype.element_ty)
    tl.store(found + row * cells + places, mean, mask=inside)
