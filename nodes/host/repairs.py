"""What an editor did to a picture: how it moved and tinted all of it, and what it changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import alignment, changes, masks
from ...kernels.alignment import Fit
from . import arguments, progress

MOTIONS = tuple(alignment.MOTIONS)


@dataclass(frozen=True)
class Sight:
    """What counts as a change.

    Attributes:
        threshold: difference of a colour, in (0, 1].
        tolerance: in pixels, how far edges may be off or blurred.
        smallest: patches with fewer pixels are none.
        dilation: pixels by which the mask is grown on each side.
        feather: width in pixels of the mask's soft rim, which lies inside it.
    """

    threshold: float
    tolerance: int
    smallest: int
    dilation: int
    feather: int


def aligned_changes(
    source: Tensor, edited: Tensor, motion: str, colors: bool, sight: Sight
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Undo what was done to the whole picture, and find what was done to parts of it.

    Args:
        source, edited: (B, 3, H, W), the same sizes.
        motion: one of MOTIONS.
        colors: whether to undo a drift of the colours.
        sight: what counts as a change.

    Returns:
        The aligned pictures (B, 3, H, W), masks and differences (B, H, W), and a sentence each.
    """
    found = []
    for index in range(len(source)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        one, other = source[index : index + 1].float(), edited[index : index + 1].float()
        fit = alignment.fitted(one, other, motion, colors)
        laid, covered = alignment.laid_over(other, fit)
        region = changes.changed(
            one, laid, covered, sight.threshold, sight.tolerance, sight.smallest
        )
        mask = masks.dilated(region, 2 * sight.dilation + 1)
        share = float(mask.mean())
        if share in (0, 1):
            progress.warn(_nothing if share == 0 else _everything)
        text = f"picture {index + 1}: {described(fit, *one.shape[2:])}; {share:.1%} changed"
        soft = masks.feathered_inward(mask, 0.5, sight.feather)
        found.append((laid, soft, changes.difference(one, laid), text))
    laid, soft, differences, texts = zip(*found, strict=True)
    return torch.cat(laid), torch.cat(soft), torch.cat(differences), list(texts)


_nothing = "the pictures do not differ by threshold anywhere, so the mask is empty: lower it"
_everything = (
    "the pictures differ by threshold everywhere, so the mask is full: raise it, or let align find "
    "a larger motion"
)


def described(fit: Fit, height: int, width: int) -> str:
    """What was done to the whole picture, for people."""
    half = max(height, width) / 2
    right, down = (length * half for length in fit.shift)
    parts = []
    if fit.moves(height, width):
        parts.append(
            f"zoom {fit.zoom:.4f}, shift {right:+.2f} right and {down:+.2f} down in pixels"
        )
        if fit.turn or fit.stretch != 1:
            parts.append(f"turn {math.degrees(fit.turn):+.2f} degrees, stretch {fit.stretch:.4f}")
    if fit.tints():
        # The fit undoes the drift, so what was done is its inverse.
        drifts = [
            f"{color} {1 / gain:.3f} {-offset / gain:+.3f}"
            for color, gain, offset in zip(_colors, fit.gains, fit.offsets, strict=True)
        ]
        parts.append("gain and offset of " + ", ".join(drifts))
    return "; ".join(parts) or "not moved or tinted as a whole"


_colors = ("red", "green", "blue")


def at_size_of(source: Tensor, edited: Tensor) -> Tensor:
    """An edited picture at its source's size.

    One that is less than a VAE's crop smaller is laid where VAE Encode crops it from, any other is
    scaled.

    Args:
        source, edited: (B, 3, H, W), any sizes.
    """
    if source.shape[2:] == edited.shape[2:]:
        return edited
    missing = [a - b for a, b in zip(source.shape[2:], edited.shape[2:], strict=True)]
    if all(0 <= length < arguments.largest_crop for length in missing):
        placed, _ = arguments.placed_over(edited.movedim(1, -1), source.movedim(1, -1))
        return placed.movedim(-1, 1)
    scaled = F.interpolate(
        edited.float(), source.shape[2:], mode="bicubic", antialias=True, align_corners=False
    )
    return scaled.clamp(0, 1)
