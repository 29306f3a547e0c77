"""The repair workflow: Change Mask and Composite Edit on what a stand-in for an editor made."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from portraits.dataset import Edit, edited_pixels, edits, pictures
from portraits.instruction_editor import drawn_drift, drifted

from . import stock

DEFAULTS: dict[str, Any] = dict(
    align="zoom and shift",
    match_colors=True,
    threshold=0.06,
    tolerance=1,
    smallest_part=16,
    dilation=2,
    feather=0,
)


@dataclass(frozen=True)
class Repair:
    """A held-out edit, what the editor made of it, and what the workflow made of that.

    Attributes:
        edit: what was asked for.
        source, target, edited, repaired: (1, 3, H, W), `target` is the true edit.
        mask: (1, H, W), what Change Mask found.
        report: what it says.
    """

    edit: Edit
    source: Tensor
    target: Tensor
    edited: Tensor
    repaired: Tensor
    mask: Tensor
    report: str

    @property
    def truth(self) -> Tensor:
        """Which pixels the true edit changes, (1, H, W)."""
        return edited_pixels(self.source, self.target)

    def outside(self, picture: Tensor) -> float:
        """PSNR in dB against the source where the true edit changes nothing, at most 100."""
        unchanged = 1 - self.truth
        squares = (picture - self.source).square().mean(1) * unchanged
        return float(-10 * (squares.sum() / unchanged.sum()).clamp(min=1e-10).log10())

    def kept(self, picture: Tensor) -> float:
        """The share of the true edit that a picture has: 1 less its error in parts of the edit.

        Absolute errors are summed over the pixels that the true edit changes.
        """
        truth = self.truth[:, None]
        missing, whole = ((p - self.target).abs() * truth for p in (picture, self.source))
        return float(1 - missing.sum() / whole.sum())


def repairs(split: str, seed: int, count: int, size: int, **changes: Any) -> list[Repair]:
    """Edits drawn, drifted and repaired with the nodes at their defaults, or `changes`."""
    drawn, rng, found = edits(split, seed, count), random.Random(seed), []
    for edit in drawn:
        source, target = (
            pictures([person], size).float() / 255 for person in (edit.source, edit.target)
        )
        edited = drifted(target, drawn_drift(rng))
        aligned, mask, _, report = stock.call(
            "PinpointChangeMask",
            source=source.movedim(1, -1),
            edited=edited.movedim(1, -1),
            **{**DEFAULTS, **changes},
        )
        repaired, _ = stock.call(
            "PinpointCompositeEdit",
            source=source.movedim(1, -1),
            edited=aligned,
            mask=mask,
            **dict(threshold=0.1, feather=0),
        )
        found.append(Repair(edit, source, target, edited, repaired.movedim(-1, 1), mask, report))
    return found
