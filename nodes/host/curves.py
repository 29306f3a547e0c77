"""Losses as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def drawn(
    losses: Sequence[float], first_phase: int = 0, size: tuple[int, int] = (600, 300)
) -> Tensor:
    """Each step's loss and their running mean, (1, H, W, 3).

    Args:
        first_phase: steps in which only a word is learned; 0 = there are no phases.
    """
    width, height = size
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    values = np.array(losses)
    top, margin = float(np.quantile(values, 0.99)) * 1.1 or 1.0, 24
    count = max(1, len(values) - 1)

    def points(series: np.ndarray, offset: int = 0) -> list[tuple[float, float]]:
        return [
            (
                margin + (i + offset) / count * (width - 2 * margin),
                height - margin - min(1.0, v / top) * (height - 2 * margin),
            )
            for i, v in enumerate(series)
        ]

    draw.rectangle([margin, margin, width - margin, height - margin], outline="#cccccc")
    if 0 < first_phase < len(values):
        x = margin + first_phase / count * (width - 2 * margin)
        draw.line([x, margin, x, height - margin], fill="#cccccc")
        draw.text((margin + 4, 6), "word", fill="#555555")
        draw.text((x + 4, 6), "word and model", fill="#555555")
    draw.line(points(values), fill="#b8c7e0")
    window = min(max(25, len(values) // 50), len(values))
    mean = np.convolve(values, np.ones(window) / window, "valid")
    draw.line(points(mean, window - 1), fill="#2050a0", width=2)
    draw.text((margin + 4, margin + 4), f"{top:.3f}", fill="#555555")
    draw.text((margin + 4, height - margin - 14), "0", fill="#555555")
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]
