"""What Learn Identity is told, what it learns from, and how it went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["uniform", "logit-normal"]


@dataclass(frozen=True)
class LearningSettings:
    """How an identity is learned.

    Attributes:
        name: of the word, `<name>` in prompts.
        class_word: what it is an instance of.
        start_word: whose embeddings the word's vectors start from.
        attributes: words that shall stay free to be changed.
        vectors: of the word, in each text encoder.
        token_steps: steps in which only the word is learned.
        token_rate: Adam's rate for the word, in parts of its size; 0 = it stays as it starts.
        steps: steps in which the model is changed too.
        rate: Adam's rate for the low-rank change.
        rank: of the change; one that is learned on keeps its own.
        batch: noised copies of a picture in each step.
        update_every: steps between updates of the word.
        orthogonality: weight of the loss that keeps the word apart from the attributes.
        preservation: weight of the loss that keeps the model's response to other words.
        weighting: which noise levels are drawn.
        outside_weight: weight of the picture outside the mask in the loss.
        confined: whether the word is seen inside the mask only.
        precision: in which the model computes; None = as it comes.
        saves_memory: whether blocks are computed twice instead of kept.
        preview_every: steps between previews; 0 = none.
        seed: of noise, noise levels and the change's first values.
    """

    name: str
    class_word: str
    start_word: str
    attributes: tuple[str, ...] = ()
    vectors: int = 1
    token_steps: int = 50
    token_rate: float = 0.02
    steps: int = 150
    rate: float = 1e-3
    rank: int = 8
    batch: int = 4
    update_every: int = 10
    orthogonality: float = 1.0
    preservation: float = 1.0
    weighting: Weighting = "uniform"
    outside_weight: float = 1.0
    confined: bool = True
    precision: torch.dtype | None = None
    saves_memory: bool = True
    preview_every: int = 25
    seed: int = 0

    @property
    def start_name(self) -> str:
        """The input that the start word comes from."""
        return "class_word" if self.start_word == self.class_word else "start_word"

    @property
    def total(self) -> int:
        """Steps of both phases."""
        return self.token_steps + self.steps

    @property
    def reads_attributes(self) -> bool:
        """Whether the word is kept apart from the attributes."""
        return bool(self.attributes and self.orthogonality and self.token_rate)

    def recipe(self) -> dict[str, str]:
        """All of them, for people."""
        told = {**asdict(self), "attributes": ", ".join(self.attributes)}
        told["precision"] = "auto" if self.precision is None else self.precision
        return {key: str(value) for key, value in told.items()}


@dataclass(frozen=True)
class Picture:
    """What is learned from.

    Attributes:
        latent: (1, C, [T,] H, W), as VAE Encode gives it.
        prompt: describes it, with `<name>` in it.
        mask: (1, h, w) in [0, 1], where the person is, or None.
    """

    latent: Tensor
    prompt: str
    mask: Tensor | None = None


@dataclass
class Lesson:
    """What has been learned so far, and how it went.

    Attributes:
        losses: of each step, the noise's or velocity's mean squared error.
        cosines: mean |cos| between the word and the attributes, at each update of the word.
    """

    losses: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
