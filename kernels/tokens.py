"""Some tokens taken out of a picture's, and put back among those that were kept."""

from __future__ import annotations

from torch import Tensor


def gathered(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at some places.

    Args:
        tokens: (B, L, C), any strides.
        index: (A,), int64, each in 0..L - 1.

    Returns:
        (B, A, C), contiguous.
    """
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
    return kept.contiguous().index_copy(1, index, active)
