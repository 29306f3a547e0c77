"""A stand-in for the editors that draw the whole picture anew: Kontext, Qwen-Image-Edit, Klein.

They make the edit, and besides move the picture by some per cent and tint it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """What is done to the whole picture.

    Attributes:
        zoom: above 1 everything gets larger.
        shift: of the middle to the right and down, in parts of the picture.
        gains, offsets: of red, green and blue.
    """

    zoom: float
    shift: tuple[float, float]
    gains: tuple[float, float, float]
    offsets: tuple[float, float, float]


def drawn_drift(rng: random.Random) -> Drift:
    """1 to 3 % of zoom and of shift, each either way, and colours off by a few per cent."""

    def part() -> float:
        return rng.choice((-1, 1)) * rng.uniform(0.01, 0.03)

    zoom, right, down = part(), part(), part()
    gains = [rng.uniform(0.94, 1.06) for _ in range(3)]
    offsets = [rng.uniform(-0.03, 0.03) for _ in range(3)]
    return Drift(1 + zoom, (right, down), (*gains,), (*offsets,))  # type: ignore[arg-type]


def drifted(images: Tensor, drift: Drift) -> Tensor:
    """Move and tint pictures, and round them to 8 bits: (B, 3, H, W) in 0..1.

    What a picture does not show of what comes in over its border, its outermost pixels stand for.
    """
    height, width = images.shape[2:]
    x = (torch.arange(width) + 0.5) / width * 2 - 1 - 2 * drift.shift[0]
    y = (torch.arange(height) + 0.5) / height * 2 - 1 - 2 * drift.shift[1]
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    grid = torch.stack([columns, rows], -1)[None].expand(len(images), -1, -1, -1) / drift.zoom
    moved = F.grid_sample(images, grid, "bicubic", "border", align_corners=False)
    gains, offsets = (torch.tensor(v).view(1, 3, 1, 1) for v in (drift.gains, drift.offsets))
    return ((moved * gains + offsets).clamp(0, 1) * 255).round() / 255
