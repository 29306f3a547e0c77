"""Some tokens taken out of a picture's, and put back among those that were kept."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from . import bodies, masks


def gathered(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at some places.

    Args:
        tokens: (B, L, C), any strides.
        index: (A,), int64, each in 0..L - 1.

    Returns:
        (B, A, C), contiguous.
    """
    if bodies.triton_runs(tokens):
        from .triton_bodies import tokens as triton

        return triton.gathered(tokens, index)
    return tokens.index_select(1, index)


def scattered(active: Tensor, kept: Tensor, index: Tensor) -> Tensor:
    """Kept tokens, with others in their stead at some places.

    Args:
        active: (B, A, C), of the kept ones' dtype; any strides.
        kept: (B, L, C), any strides; it is not written into.
        index: (A,), int64, each in 0..L - 1 and none twice.

    Returns:
        (B, L, C), contiguous.
    """
    if bodies.triton_runs(active, kept):
        from .triton_bodies import tokens as triton

        return triton.scattered(active, kept, index)
    return kept.contiguous().index_copy(1, index, active)


def touched(mask: Tensor, grid: tuple[int, int], halo: int) -> Tensor:
    """Which tokens of a picture a mask touches.

    Args:
        mask: (B, H, W); a token is touched if the mask is above 0 anywhere in it, in any row.
        grid: rows and columns of tokens; the last ones may reach over the mask's edge.
        halo: tokens around these that count too.

    Returns:
        (rows * columns,) bool.
    """
    inside = (mask > 0).float().amax(0)[None]
    patch = (math.ceil(mask.shape[1] / grid[0]), math.ceil(mask.shape[2] / grid[1]))
    inside = F.max_pool2d(inside, patch, ceil_mode=True)
    return masks.dilated(inside, 2 * halo + 1).flatten() > 0
