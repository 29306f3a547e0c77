"""Scores that need no opinion: everything is compared with what the drawer would have drawn.

Images are (B, 3, H, W) in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import edited_pixels
from .drawing import draw
from .people import Portrait, attributes, identity_ranges

highest_psnr = 60.0
"""PSNR is capped here, so that a few exact pictures do not carry a mean."""


def psnr(a: Tensor, b: Tensor, area: Tensor | None = None) -> Tensor:
    """PSNR of each picture in dB, inside an area (B, H, W) of 0 and 1 if one is given."""
    squared = (a - b).pow(2).mean(1)
    area = torch.ones_like(squared) if area is None else area
    mean = (squared * area).sum((1, 2)) / area.sum((1, 2)).clamp(min=1)
    return (-10 * torch.log10(mean.clamp(min=1e-12))).clamp(max=highest_psnr)


def outside(mask: Tensor, margin: int = 8) -> Tensor:
    """The complement of a mask (B, H, W) that is first grown by a margin in pixels."""
    return 1 - F.max_pool2d(mask[:, None], 2 * margin + 1, 1, margin)[:, 0]


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each pair of masks of 0 and 1, (B, H, W)."""
    union = ((a + b) > 0).sum((1, 2)).clamp(min=1)
    return (a * b).sum((1, 2)) / union


def nearest_values(images: Tensor, portraits: Sequence[Portrait], attribute: str) -> list[str]:
    """The value of an attribute that each picture shows.

    Each value is drawn into the portrait; the nearest drawing wins, compared in the attribute's
    region: the pixels that any of its values would change.
    """
    size, reference = images.shape[-1], draw(portraits, images.shape[-1])
    drawings = [
        draw([p.having(attribute, value) for p in portraits], size)
        for value in attributes[attribute]
    ]
    region = torch.stack([edited_pixels(reference, d) for d in drawings]).amax(0)
    errors = torch.stack([((images - d).pow(2).mean(1) * region).sum((1, 2)) for d in drawings])
    return [attributes[attribute][index] for index in errors.argmin(0)]


def fitted_identities(
    images: Tensor, portraits: Sequence[Portrait], steps: int = 120, size: int = 64
) -> list[Portrait]:
    """People with the given attributes whose identity is fitted to pictures.

    The drawer is differentiable in the identity, so Adam on the picture error finds it; two starts
    differ in the presence of the mole.
    """
    low, high = torch.tensor(list(identity_ranges.values())).T
    seen = F.interpolate(images, (size, size), mode="area")
    best_error = torch.full((len(images),), torch.inf)
    best = torch.zeros(len(images), len(low))
    for mole in (0.05, 0.8):
        unit = torch.full_like(best, 0.5)
        unit[:, -1] = mole
        unit.requires_grad_()
        optimizer = torch.optim.Adam([unit], lr=0.04)
        for step in range(steps):
            identity = low + (high - low) * unit.clamp(0, 1)
            error = (draw(portraits, size, identity) - seen).pow(2).mean((1, 2, 3))
            if step == steps - 1:
                break
            optimizer.zero_grad()
            error.sum().backward()
            optimizer.step()
            unit.data.clamp_(0, 1)
        better = error.detach() < best_error
        best[better] = identity.detach()[better]
        best_error[better] = error.detach()[better]
    return [
        Portrait(p.attributes, tuple(row.tolist())) for p, row in zip(portraits, best, strict=True)
    ]


def visible(portraits: Sequence[Portrait], attribute: str, smallest: int) -> list[bool]:
    """Whether changing the attribute would change at least `smallest` pixels of each portrait."""
    reference = draw(portraits)
    drawings = [
        draw([p.having(attribute, value) for p in portraits]) for value in attributes[attribute]
    ]
    region = torch.stack([edited_pixels(reference, d) for d in drawings]).amax(0)
    return [bool(count >= smallest) for count in region.sum((1, 2))]
