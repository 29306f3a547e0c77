"""Laying a picture over another one that it was made from, whatever it was zoomed and tinted by.

An editor's picture shows what a source shows, but moved, and with other colours everywhere, and
edited somewhere. The motion and the colours are found by robust Gauss-Newton steps on the picture
error from coarse to fine (Lucas and Kanade 1981; Black and Anandan 1996), so that the edit, which
neither explains, does not pull at them. Pictures are (1, 3, H, W) in [0, 1] and float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOTIONS = {
    "none": (),
    "shift": (3, 4),
    "zoom and shift": (0, 3, 4),
    "zoom, turn, stretch and shift": (0, 1, 2, 3, 4),
}
"""Which of log zoom, angle, log stretch, shift to the right and shift down are looked for."""

largest_zoom, largest_turn, largest_stretch, largest_shift = 1.25, math.radians(10), 1.1, 0.6
"""What is looked for at most; shifts in halves of the longer side."""
largest_gain, largest_offset = 1.4, 0.15
_coarsest, _chosen, _finest = 48, 128, 1024
"""Longer sides in pixels of the smallest pictures compared, of those where one of several starts
has to have won, and of the largest."""
_neutral = [0.0] * 5 + [1.0] * 3 + [0.0] * 3
_clear_error = 0.06
"""What an edit changes at least, and a fit leaves at most."""
_least_motion, _least_tint = 0.05, 0.4 / 255
"""A motion of fewer pixels, and colours that change by less, are none."""


@dataclass(frozen=True)
class Fit:
    """How an edited picture was moved and tinted against its source.

    Attributes:
        zoom: above 1 everything is larger in the edited picture.
        turn: in radians, clockwise.
        stretch: above 1 everything is wider than it is high, by this factor.
        shift: how far the middle moved to the right and down, in halves of the longer side.
        gains, offsets: red, green and blue of the source are gain times the edited + offset.
    """

    zoom: float = 1.0
    turn: float = 0.0
    stretch: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offsets: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def moves(self, height: int, width: int) -> bool:
        """Whether any pixel of a picture moves by a twentieth of its size."""
        reach = math.hypot(height, width) / 2
        turned = math.hypot(self.zoom * math.cos(self.turn) - 1, self.zoom * math.sin(self.turn))
        farthest = reach * (turned + abs(self.stretch - 1))
        return farthest + math.hypot(*self.shift) * max(height, width) / 2 > _least_motion

    def tints(self) -> bool:
        """Whether any colour changes by more than rounding to 8 bits does."""
        ends = [(o, g - 1 + o) for g, o in zip(self.gains, self.offsets, strict=True)]
        return max(abs(end) for pair in ends for end in pair) > _least_tint


def fitted(source: Tensor, edited: Tensor, motion: str, colors: bool) -> Fit:
    """Find how an edited picture was moved and tinted.

    Args:
        source: (1, 3, H, W).
        edited: (1, 3, H, W).
        motion: one of MOTIONS.
        colors: whether to look for gains and offsets of the colours.
    """
    motions, tints = [*MOTIONS[motion]], [*range(5, 11)] if colors else []
    if not motions and not tints:
        return Fit()
    states: list[Tensor] = []
    best = torch.tensor(_neutral, dtype=torch.float64)
    for small_source, small_edited in _pyramid(source, edited):
        seen = small_source, small_edited
        if states:
            if max(small_source.shape[2:]) > _chosen:
                states = [best]
            states = [_settled(*seen, state, motions + tints, _fine) for state in states]
        else:
            starts = _starts(*seen, motion)
            states = [_settled(*seen, start, motions + tints, _coarse) for start in starts]
            if tints:
                # What changes most of a picture, as another background does, would else be taken
                # for a tint of all of it.
                moved = [_settled(*seen, start, motions, _coarse) for start in starts]
                states += [_settled(*seen, state, motions + tints, _fine) for state in moved]
        best = min(states, key=partial(_misfit, *seen))
    zoom, turn, stretch, right, down, *tint = best.tolist()
    found = Fit(
        *(math.exp(zoom), turn, math.exp(stretch), (right, down)),
        *((tint[0], tint[1], tint[2]), (tint[3], tint[4], tint[5])),
    )
    if not found.moves(*source.shape[2:]):
        found = Fit(gains=found.gains, offsets=found.offsets)
    return found if found.tints() else replace(found, gains=Fit.gains, offsets=Fit.offsets)


_coarse, _fine = (0.3, 0.2, 0.2, 0.14, 0.14, 0.1, 0.1), (0.1, 0.07, 0.05, 0.04, 0.03, 0.03)
"""Errors at which a pixel counts a quarter, step by step: on the smallest pictures, and after."""


def _settled(
    source: Tensor, edited: Tensor, state: Tensor, free: list[int], scales: Sequence[float]
) -> Tensor:
    """A state after a step at each scale."""
    for scale in scales if free else ():
        state = _stepped(source, edited, state, free, scale)
    return state


def laid_over(edited: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    """Undo the motion and the colours of a fit.

    Returns:
        (1, 3, H, W), beyond the edited picture's border its outermost pixels; and (1, H, W), 1
        where the edited picture reaches.
    """
    height, width = edited.shape[2:]
    covered = torch.ones_like(edited[:, 0])
    if fit.moves(height, width):
        motion = (math.log(fit.zoom), fit.turn, math.log(fit.stretch), *fit.shift)
        grid, _, _ = _grid(motion, height, width, edited.device)
        covered = (grid.abs() <= 1).all(-1).float()
        edited = F.grid_sample(
            edited, grid, mode="bicubic", padding_mode="border", align_corners=False
        )
    if fit.tints():
        gains, offsets = (
            edited.new_tensor(values).view(1, 3, 1, 1) for values in (fit.gains, fit.offsets)
        )
        edited = edited * gains + offsets
    return edited.clamp(0, 1), covered


class _Warped(NamedTuple):
    """An edited picture at the source's places; P pixels.

    Attributes:
        colors: (3, P).
        slopes: (2, 3, P), by the place to the right and down, in halves of the longer side.
        places: (2, P), where each pixel came from, before the shift.
        stretches: (2, P), how that place changes with the log stretch.
        covered: (P,), 1 where the edited picture reaches.
    """

    colors: Tensor
    slopes: Tensor
    places: Tensor
    stretches: Tensor
    covered: Tensor


def _pyramid(source: Tensor, edited: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both pictures from small to large, each twice the one before."""
    longer = max(source.shape[2:])
    sides = [min(longer, _finest)]
    while sides[-1] >= 2 * _coarsest:
        sides.append(sides[-1] // 2)
    for side in reversed(sides):
        size = [max(8, round(length * side / longer)) for length in source.shape[2:]]
        yield tuple(
            F.interpolate(picture, size, mode="bilinear", antialias=True, align_corners=False)
            for picture in (source, edited)
        )


def _grid(
    motion: Sequence[float], height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where to look in the edited picture for each pixel of the source.

    Args:
        motion: log zoom, angle, log stretch, shift to the right and down.
        height, width: of the pictures.
        device: of the results.

    Returns:
        (1, H, W, 2) for `grid_sample`; (2, H, W) the same places without the shift, in halves of
        the longer side; and (2, H, W), how these change with the log stretch.
    """
    half = max(height, width) / 2
    zoom, turn, stretch, right, down = motion
    x = (torch.arange(width, device=device) + 0.5 - width / 2) * (math.exp(stretch / 2) / half)
    y = (torch.arange(height, device=device) + 0.5 - height / 2) * (math.exp(-stretch / 2) / half)
    along, across = math.exp(zoom) * math.cos(turn), math.exp(zoom) * math.sin(turn)
    rows, columns = y[:, None], x[None]
    places = torch.stack([along * columns - across * rows, across * columns + along * rows])
    stretches = torch.stack([along * columns + across * rows, across * columns - along * rows]) / 2
    grid = torch.stack(
        [(places[0] + right) * (2 * half / width), (places[1] + down) * (2 * half / height)], -1
    )
    return grid[None], places, stretches


def _warped(edited: Tensor, state: Tensor) -> _Warped:
    height, width = edited.shape[2:]
    half = max(height, width) / 2
    padded = F.pad(edited, (1, 1, 1, 1), mode="replicate")
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * (half / 2)
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * (half / 2)
    grid, places, stretches = _grid(state[:5].tolist(), height, width, edited.device)
    stacked = torch.cat([edited, right, down], 1)
    seen = F.grid_sample(stacked, grid, padding_mode="border", align_corners=False)
    covered = (grid.abs() <= 1).all(-1)[0].float()
    colors, right, down = seen[0].flatten(1).chunk(3)
    slopes = torch.stack([right, down])
    return _Warped(colors, slopes, places.flatten(1), stretches.flatten(1), covered.flatten())


def _stepped(
    source: Tensor, edited: Tensor, state: Tensor, free: list[int], scale: float
) -> Tensor:
    """One Gauss-Newton step, each pixel weighted by how well it fits (Geman and McClure)."""
    warped = _warped(edited, state)
    gains, offsets = state[5:8].to(source), state[8:].to(source)
    tinted = warped.colors * gains[:, None] + offsets[:, None]
    errors = tinted - source[0].flatten(1)
    weights = warped.covered / (1 + errors.square().mean(0) / scale**2).square()
    (x, y), (wider, lower) = warped.places, warped.stretches
    normal, slope = torch.zeros(11, 11, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
    for channel, error in enumerate(errors):
        right, down = warped.slopes[:, channel] * gains[channel]
        moves = [right * x + down * y, down * x - right * y, right * wider + down * lower]
        tints = [warped.colors[channel], torch.ones_like(error)]
        rows = torch.stack([*moves, right, down, *tints])
        weighted = rows * weights
        places = torch.tensor([*range(5), 5 + channel, 8 + channel])
        normal[places[:, None], places] += (weighted @ rows.T).double().cpu()
        slope[places] += (weighted @ error).double().cpu()
    # Little is known in advance, but flat pictures would otherwise tell nothing.
    trust = 1e-3 * float(weights.sum()) * scale**2 + 1e-9
    prior = torch.tensor([1.0] * 5 + [20.0] * 6, dtype=torch.float64) * trust
    slope += prior * (state - torch.tensor(_neutral, dtype=torch.float64))
    normal += prior.diag()
    step = torch.zeros_like(state)
    step[free] = torch.linalg.solve(normal[free][:, free], slope[free])
    return _limited(state - step)


def _limited(state: Tensor) -> Tensor:
    motion = [math.log(largest_zoom), largest_turn, math.log(largest_stretch)]
    reach = torch.tensor([*motion, largest_shift, largest_shift], dtype=torch.float64)
    return torch.cat(
        [
            torch.maximum(torch.minimum(state[:5], reach), -reach),
            state[5:8].clamp(1 / largest_gain, largest_gain),
            state[8:].clamp(-largest_offset, largest_offset),
        ]
    )


def _misfit(source: Tensor, edited: Tensor, state: Tensor) -> float:
    """Mean robust error in 0..1 where the edited picture reaches."""
    warped = _warped(edited, state)
    gains, offsets = state[5:8, None].to(source), state[8:, None].to(source)
    squares = (warped.colors * gains + offsets - source[0].flatten(1)).square().mean(0)
    errors = squares / (squares + _clear_error**2)
    return float((errors * warped.covered).sum() / warped.covered.sum().clamp(min=1))


def _starts(source: Tensor, edited: Tensor, motion: str) -> list[Tensor]:
    """No motion, and some zooms with the shift that phase correlation finds for each."""
    states = [torch.tensor(_neutral, dtype=torch.float64)]
    height, width = edited.shape[2:]
    for zoom in {"none": (), "shift": (0.0,)}.get(motion, (-0.06, -0.03, 0.0, 0.03, 0.06)):
        zoomed = states[0].clone()
        zoomed[0] = zoom
        grid, _, _ = _grid(zoomed[:5].tolist(), height, width, edited.device)
        seen = F.grid_sample(edited, grid, padding_mode="border", align_corners=False)
        zoomed[3:5] = math.exp(zoom) * _correlated(source, seen)
        states.append(_limited(zoomed))
    return states


def _correlated(source: Tensor, edited: Tensor) -> Tensor:
    """The shift (2,) to the right and down by phase correlation, in halves of the longer side.

    Kuglin and Hines, 1975.
    """
    height, width = source.shape[2:]
    window = torch.hann_window(height, False)[:, None] * torch.hann_window(width, False)
    spectra = [
        torch.fft.rfft2((picture.mean(1) - picture.mean()) * window.to(picture))
        for picture in (source, edited)
    ]
    cross = spectra[1] * spectra[0].conj()
    peaks = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-8), s=(height, width))[0]
    row, column = divmod(int(peaks.argmax()), width)
    right = column - width if column > width // 2 else column
    down = row - height if row > height // 2 else row
    return torch.tensor([right, down], dtype=torch.float64) / (max(height, width) / 2)
