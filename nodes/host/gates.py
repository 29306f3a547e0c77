"""A gate between preservation and personalization: over the noise levels, and for each block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher

from ...kernels import gates
from . import layouts
from .layouts import Block

curve_points = 65
"""At which a drawn curve is read."""


@dataclass(frozen=True)
class Schedule:
    """Gamma over the progress of a sampling run; see `gates.curve`."""

    shape: str
    first: float = 0.0
    last: float = 0.0
    values: tuple[float, ...] = ()

    def at(self, progress: float) -> float:
        """Gamma in [0, 1]; progress is 0 at the first noise level and 1 at the picture."""
        return gates.curve(self.shape, self.first, self.last, self.values, progress)


@dataclass(frozen=True)
class Gate:
    """Schedules for groups of blocks, as their names are written; the last one that fits counts."""

    groups: tuple[tuple[str, Schedule], ...] = ()

    def extended(self, blocks: str, schedule: Schedule) -> Gate:
        """This gate with another schedule for some blocks."""
        return Gate((*self.groups, (blocks, schedule)))

    def of_blocks(self, model: ModelPatcher) -> dict[Block, Schedule]:
        """The schedule of each block of a model that has one.

        Raises:
            ValueError: names of blocks that the model has not.
        """
        return {
            block: schedule
            for names, schedule in self.groups
            for block in layouts.chosen_blocks(model, names)
        }


def constant(gamma: float) -> Gate:
    """The same for all blocks, all the time."""
    return Gate().extended("all", Schedule("constant", gamma, gamma))


def schedule(
    shape: str,
    first: float,
    last: float,
    values: str,
    curve: Any = None,
    floats: Any = None,
) -> Schedule:
    """The schedule that a node's inputs describe.

    Args:
        values: numbers with commas, for the shape "list".
        curve: ComfyUI's CURVE, in place of shape and values.
        floats: numbers, or one of them, in place of shape and values.

    Raises:
        ValueError: numbers that cannot be read, are none, or are not from 0 to 1.
    """
    if curve is not None and floats is not None:
        raise ValueError("curve and floats are both connected: disconnect one of them")
    if curve is not None:
        drawn = curve.to_lut(curve_points).tolist()
        return Schedule("list", values=_gammas(drawn, "curve"))
    if floats is not None:
        # A tensor without dimensions is one number, and a text is none.
        is_one = isinstance(floats, float | int | str) or getattr(floats, "ndim", None) == 0
        return Schedule("list", values=_gammas([floats] if is_one else floats, "floats"))
    if shape == "list":
        return Schedule("list", values=_gammas(_read(values), "values"))
    return Schedule(shape, first, last)


def _read(values: str) -> list[float]:
    try:
        return [float(part) for part in values.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"values is '{values}': write numbers from 0 to 1 with commas between them, such as "
            "0.3, 0.5, 0.7"
        ) from None


def _gammas(values: Any, name: str) -> tuple[float, ...]:
    try:
        gammas = tuple(map(float, values))
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is {values!r}, which is no list of numbers: connect numbers from 0 to 1"
        ) from None
    if not gammas:
        raise ValueError(f"{name} is empty: give at least one number from 0 to 1")
    for gamma in gammas:
        if not (math.isfinite(gamma) and 0 <= gamma <= 1):
            raise ValueError(f"{name} holds {gamma:g}: gamma is a number from 0 to 1")
    return gammas
