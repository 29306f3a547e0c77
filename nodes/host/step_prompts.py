"""What a guider knows of the prompts of a step, and a model call does not.

A model call shows uuids, and texts that ComfyUI may have repeated to a common length; which prompt
is a negative one, how long it is, where learned words lie in it and which area of the latent it is
for, only the guider can say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels import masks
from .tap import ModelCall
from .words import words_key

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
        words: rows of the learned words in it, by their names.
        area: of the latent, or None for all of it.
    """

    is_negative: bool
    length: int | None = None
    words: Mapping[str, list[int]] = field(default_factory=dict)
    area: Area | None = None


@dataclass(frozen=True)
class StepPrompts:
    """The prompts of a step.

    To give the opposite prompt the same area, ComfyUI copies an entry with its uuid and all, and
    puts the opposite's text into the copy.

    Attributes:
        found: by their uuids, copies last.
        size: rows and columns of the latent.
        made: what handlers keep for the step's other attentions.
    """

    found: dict[Any, list[StepPrompt]]
    size: tuple[int, int]
    made: dict[tuple, Any] = field(default_factory=dict)

    def of(self, uuid: Any, index: int) -> StepPrompt | None:
        """The prompt of a branch of a call."""
        named = self.found.get(uuid, [])
        return next(
            (p for p in named if p.is_negative == (index == 1)), named[0] if named else None
        )


def remembering(model: ModelPatcher) -> ModelPatcher:
    """A clone whose calls, and wrappers that are added from now on, know a step's prompts."""
    clone = model.clone()
    if not clone.get_wrappers(WrappersMP.PREDICT_NOISE, prompts_key):
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
    for uuid, prompt in _found(executor.class_obj):
        prompts.found.setdefault(uuid, []).append(prompt)
    inner = {**model_options["transformer_options"], prompts_key: prompts}
    return executor(x, timestep, {**model_options, "transformer_options": inner}, seed)


def _found(guider: Any) -> Iterator[tuple[Any, StepPrompt]]:
    """The prompts of a guider as they are in a run, a Source/Target Guider's source too."""
    # A copy comes after the entry whose text it was given, with another's length and words.
    texts: dict[int, tuple[int | None, Mapping[str, list[int]]]] = {}
    for conds in (guider.conds, getattr(guider, "source_conds", {})):
        for name, prompts in conds.items():
            for entry in prompts:
                tokens, text = entry.get("cross_attn"), entry["model_conds"].get("c_crossattn")
                known = None if tokens is None else tokens.shape[1], entry.get(words_key, {})
                if text is not None:
                    known = texts.setdefault(id(text), known)
                area = tuple(entry["area"]) if entry.get("area") else None
                # PerpNeg's are "negative" and "empty_negative_prompt".
                yield entry["uuid"], StepPrompt("negative" in name, *known, area)


def prompt_of(call: ModelCall, position: int) -> StepPrompt:
    """The prompt of one branch of a call; if no guider told, what its place says."""
    uuid, index = call.branches[position]
    prompts: StepPrompts | None = call.options.get(prompts_key)
    found = None if prompts is None else prompts.of(uuid, index)
    return found or StepPrompt(index == 1)


def mask_of(mask: Tensor, call: ModelCall, position: int) -> Tensor:
    """The part of a mask (B, H, W) of the whole picture that one branch of a call is about.

    Raises:
        ValueError: another node shows the model parts of the latent, and nobody says which.
    """
    prompts: StepPrompts | None = call.options.get(prompts_key)
    area = prompt_of(call, position).area
    if prompts is None:
        return mask
    part, size = mask, prompts.size
    if area is not None:
        half = len(area) // 2
        (height, width), (top, left) = area[half - 2 : half], area[-2:]
        part = masks.resized(mask, *size)[:, top : top + height, left : left + width]
        size = part.shape[-2], part.shape[-1]
    if call.latent[-2:] != size:
        raise ValueError(
            f"mask is of a latent or a prompt's area of {size[1]}x{size[0]} cells, but another "
            f"node shows the model tiles of {call.latent[-1]}x{call.latent[-2]}, and where they "
            "lie cannot be known: disconnect the mask, or sample without tiles"
        )
    return part
