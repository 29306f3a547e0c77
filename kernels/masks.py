"""Masks: from velocity differences to soft masks, and the arithmetic that edits share.

Masks are (B, H, W) in [0, 1], 1 = edit, unless a function says otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bodies


def velocity_difference(target: Tensor, source: Tensor) -> Tensor:
    """Mean over channels of |v_target - v_source|: (B, C, ..., H, W) -> (B, H, W).

    Frames of a video latent are averaged, so that one mask serves all of them.
    FocusFlow, phase 1.
    """
    if bodies.triton_runs(target, source):
        from .triton_bodies import masks as triton

        return triton.velocity_difference(target, source)
    difference = (target - source).abs().mean(1)
    return difference.flatten(1, -3).mean(1) if difference.ndim > 3 else difference


def normalized(heat: Tensor, low: float = 0.01, high: float = 0.99) -> Tensor:
    """Clip each map to its own quantiles and stretch it to [0, 1] (epsilon 1e-8).

    In torch only: exact quantiles take a sort, beside which the rest is nothing.

    Args:
        heat: (B, H, W), any range.
        low, high: quantiles in [0, 1], low < high.
    """
    flat = heat.flatten(1).float()
    bounds = torch.quantile(flat, torch.tensor([low, high], device=heat.device), dim=1)
    bottom, top = bounds[0].view(-1, 1, 1), bounds[1].view(-1, 1, 1)
    clipped = torch.minimum(torch.maximum(heat, bottom), top)
    return (clipped - bottom) / (top - bottom + 1e-8)


def dilated(mask: Tensor, size: int) -> Tensor:
    """Maximum over a size x size window; an even size is rounded up to the next odd one.

    Sizes 0 and 1 change nothing.
    """
    if size <= 1:
        return mask
    size |= 1
    return F.max_pool2d(mask[:, None], size, stride=1, padding=size // 2)[:, 0]


def blurred(mask: Tensor, size: int) -> Tensor:
    """Mean over a size x size window, taken over the cells that exist, so borders do not darken.

    An even size is rounded up to the next odd one; sizes 0 and 1 change nothing.
    """
    if size <= 1:
        return mask
    size |= 1
    mean = F.avg_pool2d(mask[:, None], size, 1, size // 2, count_include_pad=False)
    return mean[:, 0].clamp(0, 1)


def softened(mask: Tensor, deviation: float) -> Tensor:
    """Gaussian blur with a standard deviation in cells; borders repeat, so they do not darken.

    Deviation 0 changes nothing.
    """
    if deviation <= 0:
        return mask
    reach = math.ceil(3 * deviation)
    offsets = torch.arange(-reach, reach + 1, device=mask.device, dtype=mask.dtype)
    kernel = torch.exp(-0.5 * (offsets / deviation) ** 2)
    kernel = kernel / kernel.sum()
    spread = mask[:, None]
    for weight, padding in (
        (kernel.view(1, 1, -1, 1), (0, 0, reach, reach)),
        (kernel.view(1, 1, 1, -1), (reach, reach, 0, 0)),
    ):
        spread = F.conv2d(F.pad(spread, padding, mode="replicate"), weight)
    return spread[:, 0].clamp(0, 1)


def without_specks(heat: Tensor, threshold: float, smallest: int) -> Tensor:
    """Set to 0 every patch of heat at or above a threshold that has fewer cells than `smallest`.

    Cells that touch at a corner belong together. `smallest` 0 and 1 change nothing.
    """
    hot = heat >= threshold
    if smallest <= 1 or not hot.any():
        return heat
    # Each patch comes to one of its cells' numbers (Shiloach and Vishkin, 1982): a cell, and the
    # cell of its number, take the highest number beside them, then what the cell of that one has.
    numbers = torch.arange(1, heat[0].numel() + 1, device=heat.device, dtype=torch.float64)
    labels = (numbers.view(1, *heat.shape[1:]) * hot).flatten(1)
    while True:
        spread = F.max_pool2d(labels.view_as(heat)[:, None], 3, stride=1, padding=1)[:, 0] * hot
        highest = spread.flatten(1)
        if torch.equal(highest, labels):
            break
        told = labels.scatter_reduce(1, (labels.long() - 1).clamp(min=0), highest, "amax")
        labels = torch.maximum(told, highest)
        labels = torch.maximum(labels, labels.gather(1, (labels.long() - 1).clamp(min=0)))
        labels *= hot.flatten(1)
    labels = labels.long()
    sizes = torch.zeros(len(heat), heat[0].numel() + 1, dtype=torch.long, device=heat.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    small = hot & (sizes.gather(1, labels) < smallest).view_as(heat)
    return heat.masked_fill(small, 0.0)


def contrasted(mask: Tensor, threshold: float, softness: float) -> Tensor:
    """Shape a soft mask around a threshold: 0.5 at the threshold, rising over `softness`.

    The rise never reaches below 0, so that places without any heat stay outside: softness counts
    up to twice the threshold.
    `threshold` 0.5 with `softness` 1 changes nothing; `softness` 0 gives a hard mask.
    """
    softness = min(softness, 2 * threshold)
    if softness <= 0:
        return (mask >= threshold).to(mask.dtype)
    return (0.5 + (mask - threshold) / softness).clamp(0, 1)


def resized(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize by area when shrinking and to the nearest cell when growing.

    A mask that is grown by a whole factor and shrunk again is unchanged, bit for bit.
    """
    if mask.shape[-2:] == (height, width):
        return mask
    shrunk = mask[:, None]
    if mask.shape[-2] > height or mask.shape[-1] > width:
        smaller = (min(mask.shape[-2], height), min(mask.shape[-1], width))
        # Sums of equal numbers are exact in float64, and so is their mean in the mask's own dtype.
        shrunk = F.interpolate(shrunk.double(), smaller, mode="area").to(mask.dtype)
    return F.interpolate(shrunk, (height, width), mode="nearest-exact")[:, 0]


def feathered_inward(mask: Tensor, threshold: float, feather: int) -> Tensor:
    """Opacity of a paste that never leaves the mask.

    Outside (mask < threshold) the opacity is exactly 0; inside it rises with the distance to the
    outside, (chessboard distance - 0.5) / feather, up to exactly 1. The border of the picture is
    not an outside.

    Args:
        mask: (B, H, W).
        threshold: values from here on are inside.
        feather: width of the ramp in pixels; 0 gives a hard edge.
    """
    inside = (mask >= threshold).float()
    if feather <= 0:
        return inside
    reached = inside
    depth = torch.zeros_like(inside)
    for _ in range(feather):
        depth += reached
        reached = 1 - dilated(1 - reached, 3)
    ramp = ((depth - 0.5) / feather).clamp(0, 1)
    return torch.where(reached > 0, torch.ones_like(ramp), ramp)
