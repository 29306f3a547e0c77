"""Widgets and wire types that several nodes share."""

from __future__ import annotations

import torch
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

PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""By the options of `precision`; None = see `lessons.precision_for`."""


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


def clip_percentiles() -> list[io.Float.Input]:
    """Between which percentiles a heat map is stretched."""
    return [
        io.Float.Input(
            "clip_low",
            default=1.0,
            min=0.0,
            max=49.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Percentile of the heat that becomes 0.",
        ),
        io.Float.Input(
            "clip_high",
            default=99.0,
            min=51.0,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Percentile of the heat that becomes 1.",
        ),
    ]


def remember_source() -> io.Boolean.Input:
    """Whether a second edit of the same picture is to cost half."""
    return io.Boolean.Input(
        "remember_source",
        default=True,
        optional=True,
        advanced=True,
        tooltip=(
            "Keep what the model says of the source: with the same picture, source prompt, steps "
            "and seed the next edit asks it for the target only. Takes a latent of main memory a "
            "step (1 MB at 1024 px), 256 MB at most, freed with the model. Off: both prompts share "
            "one call."
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


def rate(default: float, tooltip: str) -> io.Float.Input:
    """How fast a training changes weights."""
    return io.Float.Input(
        "rate", default=default, min=0.0, max=0.1, step=1e-5, round=1e-6, tooltip=tooltip
    )


def weighting() -> io.Combo.Input:
    """Chooses the noise levels that a training draws."""
    return io.Combo.Input(
        "weighting",
        options=["uniform", "logit-normal"],
        default="uniform",
        tooltip="Which noise levels are learned from: all alike, or the middle more often.",
    )


def precision(tooltip: str) -> io.Combo.Input:
    """Chooses the numbers that a model in training computes with, see `PRECISIONS`."""
    return io.Combo.Input("precision", options=list(PRECISIONS), default="auto", tooltip=tooltip)


def save_memory() -> io.Boolean.Input:
    """Whether a model in training computes its blocks twice, see `checkpointing`."""
    return io.Boolean.Input(
        "save_memory",
        default=True,
        tooltip=(
            "Compute the model's blocks twice instead of keeping what they computed: far less "
            "memory, up to a third more time."
        ),
    )


def seed(tooltip: str) -> io.Int.Input:
    """A number that all that is drawn depends on; it stays from run to run."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
    )


def active_tokens() -> io.Boolean.Input:
    """Whether only the tokens inside the mask are calculated."""
    return io.Boolean.Input(
        "active_tokens",
        default=False,
        optional=True,
        advanced=True,
        tooltip=(
            "Experimental, SD3 and Flux: calculate the target only inside the mask and let it see "
            "the source outside, so that small edits cost less. Keeps keys and values of the "
            "outside: up to 3 GB for a Flux.1 picture of 1024 x 1024."
        ),
    )
