"""Where in the latent a prompt is evaluated: ComfyUI cuts the areas of prompts out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels import masks
from .tap import ModelCall

areas_key = "pinpoint_areas"
"""In `transformer_options`: the areas of a step's prompts, see `_Areas`; also of the wrapper."""

Area = tuple[int, ...]
"""([frames,] rows, columns, [first frame,] top, left), in latent cells."""


@dataclass(frozen=True)
class _Areas:
    """Areas by a prompt's uuid and whether it is positive, and the latent's rows and columns."""

    found: dict[tuple[Any, bool], Area | None]
    size: tuple[int, int]


def entries(guider: Any) -> Iterator[tuple[tuple[Any, bool], dict[str, Any]]]:
    """The prompts of a guider as they are in a run, a Source/Target Guider's source too.

    Yields:
        A prompt's uuid and whether it is positive, and what ComfyUI knows of it.
    """
    for conds in (guider.conds, getattr(guider, "source_conds", {})):
        for key, prompts in conds.items():
            for entry in prompts:
                yield (entry["uuid"], key == "positive"), entry


def area_of(entry: dict[str, Any]) -> Area | None:
    """The area of one of `entries`, or None for the whole latent."""
    area = entry.get("area")
    return tuple(area) if area else None


def remembering(model: ModelPatcher) -> ModelPatcher:
    """A clone in which `mask_of` knows the areas of prompts."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, areas_key)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, areas_key, _tell_areas)
    return clone


def _tell_areas(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any] = {},  # noqa: B006
    seed: int | None = None,
) -> Tensor:
    """A wrapper of PREDICT_NOISE, where the guider has its conditionings at hand."""
    found = {key: area_of(entry) for key, entry in entries(executor.class_obj)}
    areas = _Areas(found, (x.shape[-2], x.shape[-1]))
    inner = {**model_options["transformer_options"], areas_key: areas}
    return executor(x, timestep, {**model_options, "transformer_options": inner}, seed)


def mask_of(mask: Tensor, call: ModelCall, position: int) -> Tensor:
    """The part of a mask (B, H, W) of the whole picture that one branch of a call is about."""
    areas: _Areas | None = call.options.get(areas_key)
    if areas is None:
        return mask
    uuid, index = call.branches[position]
    return cropped(mask, areas.found.get((uuid, index == 0)), areas.size)


def cropped(mask: Tensor, area: Area | None, size: tuple[int, int]) -> Tensor:
    """The part of a mask (B, H, W) over an area of a latent of some rows and columns."""
    if area is None:
        return mask
    half = len(area) // 2
    (height, width), (top, left) = area[half - 2 : half], area[-2:]
    whole = masks.resized(mask, *size)
    return whole[:, top : top + height, left : left + width]
