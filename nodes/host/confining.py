"""Attention to a learned word, confined to a region of the picture."""

from __future__ import annotations

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from torch import Tensor


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


def confined(model: ModelPatcher, name: str, mask: Tensor) -> ModelPatcher:
    """A clone in which the picture sees a learned word inside a mask only.

    Prompts come from a text encoder of `words.with_words`; all that hold `<name>` are confined.
    """
    raise NotImplementedError


def confined_rows(model: ModelPatcher, confinement: Confinement) -> ModelPatcher:
    """A clone in which the picture sees given rows of every prompt inside a mask only.

    For training, where the rows are known and no guider runs; merge its wrappers into the
    `transformer_options` that `apply_model` is given.
    """
    raise NotImplementedError
