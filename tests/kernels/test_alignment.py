"""Motions and tints that are known are found, with and without an edit beside them."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


@pytest.fixture(scope="module")
def alignment(pack: ModuleType) -> ModuleType:
    return pack.kernels.alignment


def texture(height: int = 96, width: int = 128) -> Tensor:
    """Smooth blobs of several sizes, (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        F.interpolate(torch.rand(1, 3, cells, cells, generator=generator), (height, width),
                      mode="bicubic", align_corners=False)
        for cells in (5, 9, 17)
    ]  # fmt: skip
    return torch.stack(layers).mean(0).clamp(0, 1)


MOVES: dict[str, tuple[str, dict[str, Any]]] = {
    "a shift": ("shift", dict(shift=(0.05, -0.03))),
    "a far shift": ("shift", dict(shift=(-0.25, 0.1))),
    "a zoom": ("zoom and shift", dict(zoom=1.03, shift=(-0.02, 0.01))),
    "a zoom out": ("zoom and shift", dict(zoom=0.92)),
    "a turn": ("zoom, turn, stretch and shift", dict(turn=math.radians(3), zoom=1.01)),
    "a stretch": ("zoom, turn, stretch and shift", dict(stretch=1.03, shift=(0.01, 0.02))),
}


@pytest.mark.parametrize(("motion", "known"), MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "with an edit"])
def test_a_known_motion_is_found(
    alignment: ModuleType, motion: str, known: dict[str, Any], edited: bool
) -> None:
    """`laid_over` with a fit moves as an editor would whose source is the moved picture."""
    after, fit = texture(), alignment.Fit(**known)
    before, _ = alignment.laid_over(after, fit)
    if edited:
        after[..., 30:60, 40:75] = torch.tensor([0.9, 0.1, 0.8]).view(1, 3, 1, 1)
    found = alignment.fitted(before, after, motion, colors=False)
    half = 64
    assert abs(found.zoom - fit.zoom) * half < 0.25
    assert abs(found.turn - fit.turn) * half < 0.25
    assert abs(found.stretch - fit.stretch) * half < 0.25
    for a, b in zip(found.shift, fit.shift, strict=True):
        assert abs(a - b) * half < 0.25


def test_a_known_tint_is_found_and_undone(alignment: ModuleType) -> None:
    before = texture()
    fit = alignment.Fit(gains=(1.08, 0.95, 1.0), offsets=(-0.03, 0.02, 0.0))
    gains, offsets = (torch.tensor(v).view(1, 3, 1, 1) for v in (fit.gains, fit.offsets))
    after = (before - offsets) / gains
    found = alignment.fitted(before, after, "zoom and shift", colors=True)
    assert not found.moves(96, 128)
    laid, covered = alignment.laid_over(after, found)
    assert (laid - before).abs().max() < 2 / 255
    assert covered.all()


def test_nothing_is_found_between_a_picture_and_itself(alignment: ModuleType) -> None:
    before = texture()
    for motion in alignment.MOTIONS:
        fit = alignment.fitted(before, before.clone(), motion, colors=True)
        assert fit == alignment.Fit()
        laid, covered = alignment.laid_over(before, fit)
        assert torch.equal(laid, before)
        assert covered.all()


def test_only_what_is_looked_for_is_found(alignment: ModuleType) -> None:
    after = texture()
    before, _ = alignment.laid_over(after, alignment.Fit(zoom=1.03, turn=0.03, stretch=1.02))
    assert alignment.fitted(before, after, "none", colors=False) == alignment.Fit()
    shifted = alignment.fitted(before, after, "shift", colors=False)
    assert (shifted.zoom, shifted.turn, shifted.stretch) == (1, 0, 1)
    zoomed = alignment.fitted(before, after, "zoom and shift", colors=False)
    assert (zoomed.turn, zoomed.stretch) == (0, 1)
    assert zoomed.gains == (1, 1, 1)


def test_beyond_the_border_are_the_outermost_pixels(alignment: ModuleType) -> None:
    picture = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 3, 8, 16) / 16
    laid, covered = alignment.laid_over(picture, alignment.Fit(shift=(0.5, 0.0)))
    assert torch.allclose(laid[..., :11], picture[..., 4:15], atol=1e-5)
    assert torch.allclose(laid[..., 13:], picture[..., 15:])
    assert torch.equal(covered[0, 0], torch.tensor([1.0] * 12 + [0.0] * 4))
