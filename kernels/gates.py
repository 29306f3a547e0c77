"""How far an adapter preserves, over the time of a sampling run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

SHAPES = ("constant", "linear", "cosine", "list")


def curve(shape: str, first: float, last: float, values: Sequence[float], progress: float) -> float:
    """A gate's value.

    Args:
        shape: constant (`first`), linear or cosine (from `first` to `last`), or list (`values` at
            equal distances, with straight lines between them).
        progress: 0 at the first noise level, 1 at the picture.

    Returns:
        In the range of what is given.

    Raises:
        ValueError: a list without values.
    """
    progress = min(1.0, max(0.0, progress))
    if shape == "list":
        return _interpolated(values, progress)
    part = {
        "constant": 0.0,
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
    }[shape]
    return first + (last - first) * part


def _interpolated(values: Sequence[float], progress: float) -> float:
    if not values:
        raise ValueError("values is empty: give at least one")
    if len(values) == 1:
        return values[0]
    place = progress * (len(values) - 1)
    index = min(int(place), len(values) - 2)
    low, high = list(pairwise(values))[index]
    return low + (high - low) * (place - index)
