"""Attention to a learned word, confined to a region of the picture (S²Edit's masked attention).

The paper masks the cross-attention of the learned token alone. In joint attention the prompt's
other tokens would carry what they read from it to every place, so there they do not see it either.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...kernels import attention as attending
from ...kernels import masks
from . import arguments, layouts, step_prompts, tap
from .step_prompts import StepPrompts, prompts_key
from .tap import Attention, Proceed

log = logging.getLogger(__name__)

wrapper_key = "pinpoint_confined_words"


@dataclass(frozen=True)
class Confinement:
    """Where a word may act.

    Attributes:
        rows: of the conditioning, the word's.
        length: rows that the conditioning has.
        mask: (B or 1, H, W) in [0, 1], any size, 1 = inside.
    """

    rows: tuple[int, ...]
    length: int
    mask: Tensor

    def bias(self, attention: Attention, padding: str) -> Tensor:
        """What to add to the scores of one branch, (rows, queries, keys); one row for one mask.

        Args:
            padding: on which side the model lengthens a prompt's tokens.

        Raises:
            ValueError: the mask's batch is not the latent's.
        """
        place, call = attention.place, attention.call
        arguments.require_masks_for(self.mask, call.rows)
        frames, *size = place.grid
        inside = masks.resized(self.mask.float(), *size).clamp(0, 1).to(attention.q).flatten(1)
        columns = self._columns(attention, padding)
        count = 1 if len(self.mask) == 1 else call.rows // len(self.mask)
        return attending.confining_bias(
            inside.repeat(count, frames),
            place.image.start,
            columns,
            columns if place.kind == "joint" else [],
            (attention.q.shape[2], attention.k.shape[2]),
        )

    def _columns(self, attention: Attention, padding: str) -> list[int]:
        """The word's keys."""
        text = attention.place.text
        assert text is not None
        if padding == "left":
            return [text.stop - self.length + row for row in self.rows]
        # ComfyUI repeats the prompts of UNets to a common length.
        repeated = range(0, max(attention.call.text_length or 0, self.length), self.length)
        return [text.start + start + row for start in repeated for row in self.rows]


def confined(model: ModelPatcher, name: str, mask: Tensor) -> ModelPatcher:
    """A clone in which the picture sees a learned word inside a mask only.

    Prompts come from a text encoder of `words.with_words`; all that hold `<name>` are confined.

    Args:
        mask: (B or 1, H, W) in [0, 1], any size, 1 = inside.

    Raises:
        ValueError: a family whose attention is not known.
    """
    confiner = _Confiner(name.casefold(), mask, layouts.layout_of(model).text_padding)
    clone = tap.tapped(step_prompts.remembering(model), confiner.handle)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, wrapper_key, confiner.warn)
    return clone


def confined_rows(model: ModelPatcher, confinement: Confinement) -> ModelPatcher:
    """A clone in which the picture sees given rows of every prompt inside a mask only.

    For training, where the rows are known and no guider runs: put the clone's wrappers into the
    `transformer_options` that `apply_model` is given.

    Raises:
        ValueError: a family whose attention is not known.
    """
    padding = layouts.layout_of(model).text_padding
    biases: dict[tuple, Tensor] = {}

    def handler(attention: Attention, proceed: Proceed) -> Tensor:
        if attention.place.text is None:
            return proceed(attention)
        call = attention.call
        alike = (call.rows, call.text_length, *_form(attention))
        if alike not in biases:
            # Being a parameter, it is taken for something that stays as it is: see
            # `gradients.copied_for_backward`.
            biases[alike] = nn.Parameter(confinement.bias(attention, padding), requires_grad=False)
        bias = biases[alike]
        if len(bias) > 1:
            bias = bias.repeat(max(1, len(call.branches)), 1, 1)
        return proceed(_biased(attention, bias.expand(len(attention.q), -1, -1)))

    return tap.tapped(model, handler)


def _form(attention: Attention) -> tuple:
    """What a bias has to fit."""
    place, q, text = attention.place, attention.q, attention.place.text
    assert text is not None
    tokens = place.image.start, text.start, text.stop, q.shape[2], attention.k.shape[2]
    return place.kind, place.grid, *tokens, q.dtype, q.device


def _biased(attention: Attention, bias: Tensor) -> Attention:
    return replace(attention, mask=attending.with_bias(attention.mask, bias[:, None]))


@dataclass(frozen=True, eq=False)
class _Confiner:
    """Confines one word in a run."""

    name: str
    mask: Tensor
    padding: str

    def warn(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] = {},  # noqa: B006
        seed: int | None = None,
    ) -> Tensor:
        """A wrapper of PREDICT_NOISE: tells in the first step if no prompt has the word."""
        inner = model_options["transformer_options"]
        is_first = timestep.max() >= inner["sample_sigmas"].max()
        prompts = (prompt for named in inner[prompts_key].found.values() for prompt in named)
        if is_first and not any(self.name in prompt.words for prompt in prompts):
            log.warning(
                f"Pinpoint: a mask confines <{self.name}>, but no prompt has it: encode one with "
                "the CLIP of Apply Identity, and let no other node join it to the end of another"
            )
        return executor(x, timestep, model_options, seed)

    def handle(self, attention: Attention, proceed: Proceed) -> Tensor:
        """Handler for a tap."""
        prompts: StepPrompts | None = attention.call.options.get(prompts_key)
        if attention.place.text is None or prompts is None:
            return proceed(attention)
        call = attention.call
        alike = (self, *call.branches, call.latent, *_form(attention))
        if alike not in prompts.made:
            prompts.made[alike] = self._bias(attention)
        bias = prompts.made[alike]
        return proceed(attention if bias is None else _biased(attention, bias))

    def _bias(self, attention: Attention) -> Tensor | None:
        """For all branches; None if none of them has the word."""
        call, bias = attention.call, None
        for number in range(len(call.branches)):
            prompt = step_prompts.prompt_of(call, number)
            if prompt.length is None or self.name not in prompt.words:
                continue
            if bias is None:
                shape = attention.q.shape[2], attention.k.shape[2]
                bias = attention.q.new_zeros(len(attention.q), *shape)
            mask = step_prompts.mask_of(self.mask, call, number)
            own = Confinement(tuple(prompt.words[self.name]), prompt.length, mask)
            rows = slice(number * call.rows, (number + 1) * call.rows)
            bias[rows] = own.bias(attention, self.padding)
        return bias
