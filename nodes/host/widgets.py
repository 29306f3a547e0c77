"""Widgets and wire types that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from .inversion import SOLVERS

Trajectory = io.Custom("PINPOINT_TRAJECTORY")
"""An inverted picture with every step of its way, and recorded values if there are any."""
Identity = io.Custom("PINPOINT_IDENTITY")
"""A learned word, and a low-rank change of the model."""
Adapter = io.Custom("PINPOINT_ADAPTER")
"""Brings a subject into a model's attention."""
Subject = io.Custom("PINPOINT_SUBJECT")
"""A subject as image encoders see it."""
Gate = io.Custom("PINPOINT_GATE")
"""FlexIP's gamma over noise levels and blocks."""


def method() -> io.Combo.Input:
    """Chooses a solver."""
    return io.Combo.Input(
        "method",
        options=list(SOLVERS),
        default="RF-Solver",
        tooltip=(
            "RF-Solver is accurate at two model calls a step, FireFlow nearly so at one. Euler is "
            "the plain sampler. RF-Inversion is Euler with a pull towards noise or picture."
        ),
    )


def trend(name: str, tooltip: str) -> io.Combo.Input:
    """Chooses how a strength changes while it acts."""
    return io.Combo.Input(
        name, options=["constant", "falling", "rising"], default="constant", tooltip=tooltip
    )


def part(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A number from 0 to 1: a strength, or a point between noise (0) and picture (1)."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def blocks(default: str = "67%-100%") -> io.String.Input:
    """Chooses transformer blocks by text, see `layouts.chosen_blocks`."""
    return io.String.Input(
        "blocks",
        default=default,
        tooltip=(
            "Transformer blocks: all, a part of the depth as 67%-100%, or by name as single 20-37, "
            "double 0-5; several with commas. 67%-100% of Flux.1 is single 20-37, as in RF-Edit."
        ),
    )


def prompt(name: str, tooltip: str) -> io.String.Input:
    """A text box that says what it is for while it is empty."""
    shown = name.replace("_", " ")
    return io.String.Input(name, multiline=True, default="", tooltip=tooltip, placeholder=shown)
