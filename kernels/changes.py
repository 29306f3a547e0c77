"""Where two pictures of the same thing differ, and where something was changed on purpose.

Pictures are (B, 3, H, W) in [0, 1], maps and masks (B, H, W) in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks

least_part = 0.4
"""Around a change, pixels belong to it from this part of the threshold on."""


def difference(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of a colour at each pixel, (B, H, W)."""
    return (a - b).abs().amax(1)


def tolerant_difference(a: Tensor, b: Tensor, tolerance: int) -> Tensor:
    """The difference that no moving or blurring by `tolerance` pixels explains, (B, H, W).

    How far each colour of one picture is outside the range of the other's colours within so many
    pixels, the larger of both directions, so that something thin that went is seen as well as
    something thin that came.
    """
    if tolerance <= 0:
        return difference(a, b)
    return torch.maximum(_beyond(a, b, tolerance), _beyond(b, a, tolerance))


def _beyond(picture: Tensor, other: Tensor, tolerance: int) -> Tensor:
    size = 2 * tolerance + 1
    highest = F.max_pool2d(other, size, 1, tolerance)
    lowest = -F.max_pool2d(-other, size, 1, tolerance)
    return torch.maximum(picture - highest, lowest - picture).clamp(min=0).amax(1)


def changed(
    source: Tensor,
    aligned: Tensor,
    covered: Tensor,
    threshold: float,
    tolerance: int,
    smallest: int,
) -> Tensor:
    """Where something was changed, (1, H, W) of 0 and 1.

    A change is where the tolerant difference reaches the threshold, in a patch of at least
    `smallest` pixels. From there it goes on, no further than the tolerance can have hidden it,
    while the plain difference is a part of the threshold.

    Args:
        source: (1, 3, H, W).
        aligned: (1, 3, H, W).
        covered: (1, H, W), 1 where `aligned` shows something. Elsewhere the nearest change that
            reaches this area's border goes on, as of a background that is another now.
        threshold: in (0, 1].
        tolerance: in pixels.
        smallest: in pixels.
    """
    # Where a picture is resampled beside its border, half of it is made up.
    reached = 1 - masks.dilated(1 - covered, 2 * (tolerance + 1) + 1)
    shown = aligned.where(reached[:, None] > 0, source)
    tolerant = tolerant_difference(source, shown, tolerance)
    region = (masks.without_specks(tolerant, threshold, smallest) >= threshold).float()
    rim = (difference(source, shown) >= least_part * threshold).float()
    for _ in range(2 * tolerance + 1):
        region = torch.maximum(region, masks.dilated(region, 3) * rim)
    return _continued(region, reached)


def _continued(region: Tensor, reached: Tensor) -> Tensor:
    """Give rows and columns that are not reached the values of the nearest that are."""
    _, height, width = region.shape
    rows, columns = reached[0].amax(1).nonzero()[:, 0], reached[0].amax(0).nonzero()[:, 0]
    if not len(rows):
        return torch.zeros_like(region)
    down = torch.arange(height, device=region.device).clamp(int(rows[0]), int(rows[-1]))
    right = torch.arange(width, device=region.device).clamp(int(columns[0]), int(columns[-1]))
    return region[:, down][:, :, right]
