"""Tokens copied each in one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_block_a, _block_c = 16, 256


def gathered(tokens: Tensor, index: Tensor) -> Tensor:
    """See `kernels.tokens.gathered`."""
    batch, _, width = tokens.shape
    found = tokens.new_empty(batch, len(index), width)
    grid = (triton.cdiv(len(index), _block_a), triton.cdiv(width, _block_c), batch)
    with torch.cuda.device_of(tokens):
        _gather[grid](
            *(tokens, index.contiguous(), found, tokens.stride(), len(index), width),
            block_a=_block_a,
            block_c=_block_c,
        )
    return found


def scattered(active: Tensor, kept: Tensor, index: Tensor) -> Tensor:
    """See `kernels.tokens.scattered`: kept tokens that are replaced are not read."""
    batch, length, width = kept.shape
    # The active token that goes to each place, or -1.
    sources = index.new_full((length,), -1)
    sources[index] = torch.arange(len(index), device=index.device)
    found = kept.new_empty(batch, length, width)
    grid = (triton.cdiv(length, _block_a), triton.cdiv(width, _block_c), batch)
    with torch.cuda.device_of(kept):
        _scatter[grid](
            *(active, kept, sources, found, active.stride(), kept.stride(), length, width),
            block_a=_block_a,
            block_c=_block_c,
        )
    return found


@triton.jit
def _gather(
    tokens: tl.tensor,
    index: tl.tensor,
    found: tl.tensor,
    strides: tl.tuple,
    chosen: tl.tensor,
    width: tl.tensor,
    block_a: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Some channels of some places of one row."""
    row = tl.program_id(2).to(tl.int64)
    places = (tl.program_id(0) * block_a + tl.arange(0, block_a)).to(tl.int64)
    across = tl.program_id(1) * block_c + tl.arange(0, block_c)[None, :]
    source = tl.load(index + places, mask=places < chosen, other=0)[:, None]
    places = places[:, None]
    inside = (places < chosen) & (across < width)
    taken = tl.load(
        tokens + row * strides[0] + source * strides[1] + across * strides[2], mask=inside
    )
    tl.store(found + (row * chosen + places) * width + across, taken, mask=inside)


@triton.jit
def _scatter(
    active: tl.tensor,
    kept: tl.tensor,
    sources: tl.tensor,
    found: tl.tensor,
    active_strides: tl.tuple,
    kept_strides: tl.tuple,
    length: tl.tensor,
    width: tl.tensor,
    block_a: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Some channels of some places of one row."""
    row = tl.program_id(2).to(tl.int64)
    places = (tl.program_id(0) * block_a + tl.arange(0, block_a)).to(tl.int64)
    across = tl.program_id(1) * block_c + tl.arange(0, block_c)[None, :]
    source = tl.load(sources + places, mask=places < length, other=-1)[:, None]
    places = places[:, None]
    inside = (places < length) & (across < width)
    own = kept + row * kept_strides[0] + places * kept_strides[1] + across * kept_strides[2]
    new = active + row * active_strides[0] + source * active_strides[1]
    new += across * active_strides[2]
    stays = tl.load(own, mask=inside & (source < 0), other=0.0)
    comes = tl.load(new, mask=inside & (source >= 0), other=0.0)
    taken = tl.where(source < 0, stays, comes)
    tl.store(found + (row * length + places) * width + across, taken, mask=inside)
