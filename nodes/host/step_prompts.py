"""What a guider knows of the prompts of a step, and a model call does not.

A model call shows uuids, and texts that ComfyUI may have repeated to a common length; which prompt
is a negative one, how long it is and which area of the latent it is for, only the guider can say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels import masks
from .tap import ModelCall

prompts_key = "pinpoint_step_prompts"
"""In `transformer_options`: the step's `StepPrompts`; also of the wrapper."""

Area = tuple[int, ...]
"""([frames,] rows, columns, [first frame,] top, left), in latent cells."""


@dataclass(frozen=True)
class StepPrompt:
    """One prompt of a step.

    Attributes:
        is_negative: whether guidance leads away from it.
        length: its tokens, or None.
        area: of the latent, or None for all of it.
    """

    is_negative: bool
    length: int | None = None
    area: Area | None = None


@dataclass(frozen=True)
class StepPrompts:
    """The prompts of a step by their uuids, and the rows and columns of the latent.

    To give the opposite prompt the same area, ComfyUI copies an entry with its uuid and all.
    """

    found: dict[Any, list[StepPrompt]]
    size: tuple[int, int]

    def of(self, uuid: Any, index: int) -> StepPrompt | None:
        """The prompt of a branch of a call."""
        named = self.found.get(uuid, [])
        return next(
            (p for p in named if p.is_negative == (index == 1)), named[0] if named else None
        )


def entries(guider: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The prompts of a guider as they are in a run, a Source/Target Guider's source too.

    Yields:
        The guider's name for a prompt, such as "positive", and what ComfyUI knows of it.
    """
    for conds in (guider.conds, getattr(guider, "source_conds", {})):
        for name, prompts in conds.items():
            for entry in prompts:
                yield name, entry


def area_of(entry: dict[str, Any]) -> Area | None:
    """The area of one of `entries`, or None for the whole latent."""
    area = entry.get("area")
    return tuple(area) if area else None


def remembering(model: ModelPatcher) -> ModelPatcher:
    """A clone whose calls know the prompts of their step."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, prompts_key)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, prompts_key, _tell)
    return clone


def _tell(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any] = {},  # noqa: B006
    seed: int | None = None,
) -> Tensor:
    """A wrapper of PREDICT_NOISE, where the guider has its conditionings at hand."""
    prompts = StepPrompts({}, (x.shape[-2], x.shape[-1]))
    for name, entry in entries(executor.class_obj):
        text = entry.get("cross_attn")
        length = None if text is None else text.shape[1]
        # PerpNeg's are "negative" and "empty_negative_prompt".
        known = StepPrompt("negative" in name, length, area_of(entry))
        prompts.found.setdefault(entry["uuid"], []).append(known)
    inner = {**model_options["transformer_options"], prompts_key: prompts}
    return executor(x, timestep, {**model_options, "transformer_options": inner}, seed)


def prompt_of(call: ModelCall, position: int) -> StepPrompt:
    """The prompt of one branch of a call; if no guider told, what its place says."""
    uuid, index = call.branches[position]
    prompts: StepPrompts | None = call.options.get(prompts_key)
    found = None if prompts is None else prompts.of(uuid, index)
    return found or StepPrompt(index == 1)


def mask_of(mask: Tensor, call: ModelCall, position: int) -> Tensor:
    """The part of a mask (B, H, W) of the whole picture that one branch of a call is about."""
    prompts: StepPrompts | None = call.options.get(prompts_key)
    if prompts is None:
        return mask
    return cropped(mask, prompt_of(call, position).area, prompts.size)


def cropped(mask: Tensor, area: Area | None, size: tuple[int, int]) -> Tensor:
    """The part of a mask (B, H, W) over an area of a latent of some rows and columns."""
    if area is None:
        return mask
    half = len(area) // 2
    (height, width), (top, left) = area[half - 2 : half], area[-2:]
    whole = masks.resized(mask, *size)
    return whole[:, top : top + height, left : left + width]
