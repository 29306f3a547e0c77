"""What a FlexIP adapter is trained from, and how."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels.flexip import Mode
from .learning_settings import Weighting


class Text(NamedTuple):
    """A caption as the text encoders give it.

    Attributes:
        tokens: (L, W).
        pooled: (W,), their pooled output, or None.
        mask: (L,), 0 where the model shall not look, or None.
    """

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """A subject's reference, and a picture of it that is to be made.

    Attributes:
        low: (P, W), and
        high: (C,), what the image encoders make of the reference.
        latent: (C, [T,] H, W), of the picture that is to be made.
        text, pooled, text_mask: its caption, see `Text`.
        invariant: whether both are the same picture.
    """

    low: Tensor
    high: Tensor
    latent: Tensor
    text: Tensor
    pooled: Tensor | None
    invariant: bool
    text_mask: Tensor | None = None

    def without_subject(self) -> Pair:
        """Without its reference, which is one of zeros then."""
        return replace(self, low=torch.zeros_like(self.low), high=torch.zeros_like(self.high))

    def captioned(self, text: Text) -> Pair:
        """With another caption."""
        return replace(self, text=text.tokens, pooled=text.pooled, text_mask=text.mask)


class Pairs(Protocol):
    """Where pairs come from."""

    @property
    def empty(self) -> tuple[Tensor | None, ...]:
        """The empty prompt, see `Text`."""

    def drawn(self, chance: random.Random) -> Pair:
        """A pair; all its pictures have the same size."""


@dataclass(frozen=True)
class TrainingSettings:
    """How an adapter is trained.

    Attributes:
        steps, batch, rate, weight_decay: of AdamW.
        warm_up: steps in which the rate rises.
        gamma_invariant, gamma_variant: ranges that gamma is drawn from.
        drop_subject, drop_text, drop_both: shares of pairs without reference or caption.
        mode: how the gate acts.
        average: decay of the exponential average of the weights, which is what is saved.
        weighting: which noise levels are drawn.
        levels: quantiles of that weighting between which they are drawn, 0 = picture, 1 = noise.
        precision: in which the model computes; None = as it comes.
        saves_memory: whether blocks are computed twice instead of kept.
        seed: of all that is drawn.
    """

    steps: int
    batch: int = 8
    rate: float = 1e-4
    weight_decay: float = 0.01
    warm_up: int = 200
    gamma_invariant: tuple[float, float] = (0.6, 1.0)
    gamma_variant: tuple[float, float] = (0.2, 0.6)
    drop_subject: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    mode: Mode = "literal"
    average: float = 0.999
    weighting: Weighting = "uniform"
    levels: tuple[float, float] = (0.0, 1.0)
    precision: torch.dtype | None = None
    saves_memory: bool = False
    seed: int = 0


@dataclass
class Progress:
    """How a training goes."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
