"""What an edit changed and kept, in numbers; None stands for what is not defined.

Pictures are (1, 3, H, W) in [0, 1], regions (1, H, W) of 0 and 1. Torchmetrics does the counting.
A region's score is published in two ways: PIE-Bench (cure-lab/PnPInversion) paints all else black
and scores the whole picture, which flatters; `pixels` counts the region's own pixels only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

highest_psnr = 100.0
"""In dB, of pictures that are the same."""
_window = 11
"""Side of SSIM's window."""

Score = float | None
Distance = Callable[[Tensor, Tensor, bool], Tensor]
"""LPIPS of two pictures in [-1, 1]: one number (1, 1, 1, 1), or if told so a map (1, 1, H, W)."""


def pixel_scores(
    a: Tensor, b: Tensor, region: Tensor | None = None, *, published: bool = True
) -> dict[str, Score]:
    """PSNR in dB, SSIM and MSE.

    Args:
        a, b: the pictures.
        region: None for all of them; scores of an empty one are not defined.
        published: paint all else black, or count the region's own pixels.
    """
    # Imported late: torchmetrics takes a second, and only these nodes need it.
    from torchmetrics.functional import mean_squared_error
    from torchmetrics.functional.image import structural_similarity_index_measure

    if region is not None and not region.any():
        return dict.fromkeys(("psnr", "ssim", "mse"))
    own = region is not None and not published
    if region is not None and published:
        a, b = a * region[:, None], b * region[:, None]
    chosen = region[:, None].expand_as(a) > 0 if own and region is not None else ...
    error = float(mean_squared_error(a[chosen].contiguous(), b[chosen].contiguous()))
    found: dict[str, Score] = {"psnr": decibels(error), "ssim": None, "mse": error}
    if min(a.shape[2:]) >= _window:
        whole, local = structural_similarity_index_measure(
            a, b, data_range=1.0, return_full_image=True
        )
        found["ssim"] = _mean_over(local, region) if own and region is not None else float(whole)
    return found


def decibels(error: float) -> float:
    """PSNR of a mean squared error, range 1, at most `highest_psnr`."""
    return min(highest_psnr, -10 * float(torch.tensor(max(error, 1e-12)).double().log10()))


def _mean_over(local: Tensor, region: Tensor) -> float:
    """Mean of a map (1, C, H, W) over a region."""
    return float((local.mean(1) * region).sum() / region.sum())


def perceptual_distance(
    a: Tensor, b: Tensor, lpips: Distance, region: Tensor | None = None, *, published: bool = True
) -> Score:
    """LPIPS (Zhang et al., 2018).

    Args:
        a, b: the pictures, at least 32 pixels high and wide.
        lpips: the network.
        region: None for all of them; the score of an empty one is not defined.
        published: paint all else black, or show `a` there in both and count the region only.
    """
    if min(a.shape[2:]) < 32 or (region is not None and not region.any()):
        return None
    if region is None or published:
        shown = [p if region is None else p * region[:, None] for p in (a, b)]
        return float(lpips(shown[0] * 2 - 1, shown[1] * 2 - 1, False))
    b = b.where(region[:, None] > 0, a)
    return _mean_over(lpips(a * 2 - 1, b * 2 - 1, True), region)


def structure_distance(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of two pictures' self-similarities.

    Tumanyan et al., Splicing ViT Features, 2022: of the last layer's keys, the class token's too.

    Args:
        a, b: keys (T, C) of the pictures' tokens.
    """
    return float((_similarity(a) - _similarity(b)).square().mean())


def _similarity(keys: Tensor) -> Tensor:
    unit = F.normalize(keys.float(), dim=-1, eps=1e-8)
    return unit @ unit.T


def cosine(a: Tensor, b: Tensor) -> Score:
    """Of two vectors; not defined where one has no direction."""
    if not a.any() or not b.any():
        return None
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def kept_share(source: Tensor, edited: Tensor, target: Tensor) -> Score:
    """How much of a true edit an edit has: 1 less its absolute error in parts of the change.

    Counted where the true edit differs from the source by more than 6/255 of a colour.
    """
    region = ((target - source).abs().amax(1, keepdim=True) > 6 / 255).to(source)
    whole = float(((target - source).abs() * region).sum())
    return 1 - float(((edited - target).abs() * region).sum()) / whole if whole else None
