"""Pictures for people: heat maps laid over images. Images are (B, H, W, 3) in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_heat_colors = ((0.05, 0.03, 0.30), (0.45, 0.05, 0.60), (0.90, 0.25, 0.25), (1.00, 0.85, 0.25))


def heat_colors(heat: Tensor) -> Tensor:
    """Colour a map in [0, 1] from dark violet over red to yellow: (B, H, W) -> (B, H, W, 3)."""
    stops = torch.tensor(_heat_colors, device=heat.device, dtype=heat.dtype)
    position = heat.clamp(0, 1) * (len(stops) - 1)
    lower = position.floor().long().clamp(max=len(stops) - 2)
    part = (position - lower)[..., None]
    return stops[lower] * (1 - part) + stops[lower + 1] * part


def heat_over(image: Tensor, heat: Tensor, opacity: float = 0.65) -> Tensor:
    """Lay a map over pictures, smooth and strongest where the map is hot.

    Args:
        image: (B or 1, H, W, 3).
        heat: (B, h, w) in [0, 1], resized to the picture.
        opacity: of the hottest places; cold ones keep a third of it.
    """
    smooth = F.interpolate(heat[:, None], image.shape[1:3], mode="bicubic", align_corners=False)
    smooth = smooth[:, 0].clamp(0, 1)
    cover = opacity * (1 / 3 + 2 / 3 * smooth)[..., None]
    return image * (1 - cover) + heat_colors(smooth) * cover
