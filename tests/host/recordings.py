"""Trajectories with recorded values, and prompts to sample with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import foreign, stock
from .inversions import inversion_for, recording

LEVEL = 1
"""Of the schedule; a solver asks there, at the trajectory's latent."""


def recorded(model: Any, name: str, **widgets: Any) -> tuple[Any, Tensor, float]:
    """A trajectory with values, one of its latents, and that one's noise level."""
    job = inversion_for(recording(model, **widgets), name, method="Euler")
    trajectory = job.run()[2]
    return trajectory, trajectory.latents[LEVEL].clone(), trajectory.sigmas[LEVEL]


def target(**extras: Any) -> stock.Conditioning:
    """Another prompt, with Invert's guidance."""
    return stock.conditioning(2, guidance=1.0, **extras)


def source() -> stock.Conditioning:
    """The prompt that the trajectory was made with."""
    return stock.conditioning(1, guidance=1.0)


def bytes_of(values: Any) -> int:
    """What a recording's tensors take, counted one by one."""
    tensors = [kept.values for levels in values.kept.values() for kept in levels.values()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def in_windows(
    model: Any, length: int, overlap: int, schedule: str = "standard_static", **widgets: Any
) -> Any:
    """A video model with ComfyUI's context windows."""
    settings = dict(context_length=length, context_overlap=overlap, context_schedule=schedule)
    settings |= dict(context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2)
    settings |= dict(freenoise=False, causal_window_fix=False)
    return foreign.node("ContextWindowsManual", **{**settings, **widgets})(model)
