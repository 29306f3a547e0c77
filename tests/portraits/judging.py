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


def drawn_values(
    portraits: Sequence[Portrait], attribute: str, size: int = 128
) -> tuple[Tensor, Tensor]:
    """Portraits with every value of an attribute, and where these drawings differ.

    Returns:
        (values, B, 3, size, size) uint8, and the region (B, size, size) of 0 and 1: the pixels
        that any value would change.
    """
    reference = draw(portraits, size)
    drawings = [
        draw([p.having(attribute, value) for p in portraits], size)
        for value in attributes[attribute]
    ]
    region = torch.stack([edited_pixels(reference, d) for d in drawings]).amax(0)
    return torch.stack([(d * 255).round().byte() for d in drawings]), region


def nearest(images: Tensor, drawings: Tensor, region: Tensor) -> list[int]:
    """Which of `drawn_values` each picture is nearest to inside the region."""
    errors = [((images - d.float() / 255).pow(2).mean(1) * region).sum((1, 2)) for d in drawings]
    return torch.stack(errors).argmin(0).tolist()


def nearest_values(images: Tensor, portraits: Sequence[Portrait], attribute: str) -> list[str]:
    """The value of an attribute that each picture shows: the nearest drawing wins."""
    drawn = drawn_values(portraits, attribute, images.shape[-1])
    return [attributes[attribute][index] for index in nearest(images, *drawn)]


def ssim(a: Tensor, b: Tensor, area: Tensor | None = None) -> Tensor:
    """Structural similarity of each pair of pictures, mean over an area (B, H, W) if one is given.

    Wang et al., 2004: Gaussian window of 11 with deviation 1.5, on luminance, range 1.
    """
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    x, y = ((picture * weights).sum(1, keepdim=True).double() for picture in (a, b))
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    window = torch.outer(line, line).view(1, 1, 11, 11) / line.sum() ** 2

    def mean(picture: Tensor) -> Tensor:
        return F.conv2d(F.pad(picture, (5, 5, 5, 5), mode="reflect"), window)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    local = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    area = torch.ones_like(local[:, 0]) if area is None else area.double()
    return ((local[:, 0] * area).sum((1, 2)) / area.sum((1, 2)).clamp(min=1)).float()


def fitted_identities(
    images: Tensor,
    portraits: Sequence[Portrait],
    steps: int = 120,
    size: int = 64,
    moles: Sequence[float] = (0.05, 0.8),
) -> list[Portrait]:
    """People with the given attributes whose identity is fitted to pictures.

    The drawer is differentiable in the identity, so Adam on the picture error finds it; the starts
    differ in the size of the mole.
    """
    low, high = torch.tensor(list(identity_ranges.values())).T
    seen = F.interpolate(images, (size, size), mode="area")
    best_error = torch.full((len(images),), torch.inf)
    best = torch.zeros(len(images), len(low))
    for mole in moles:
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
    _, region = drawn_values(portraits, attribute)
    return [bool(count >= smallest) for count in region.sum((1, 2))]
