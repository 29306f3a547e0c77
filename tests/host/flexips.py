"""Trainings of FlexIP adapters for tests: pairs of random features, and folders of pictures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import tiny_encoders
from .tapping import FAMILIES, Family

LOW, HIGH = 24, 40
"""Widths of random features."""
SIZES = dict(
    width=64, detail_tokens=3, global_tokens=2, detail_depth=1, global_depth=1, text_depth=1
)

QUICK: dict[str, Any] = dict(steps=4, batch=2, rate=1e-2, warm_up=0, weight_decay=0.0)
NEVER: dict[str, Any] = dict(drop_subject=0.0, drop_text=0.0, drop_both=0.0)
"""Settings of trainings."""
Make = Callable[..., Any]
"""Makes a trainer with changed settings."""


@dataclass
class RandomPairs:
    """Pairs of a family's shapes, invariant ones and variant ones in turn; as the trainer's.

    Attributes:
        make: `flexip_settings.Pair`.
        count: of different pairs.
    """

    make: Any
    family: Family
    count: int = 2

    @property
    def empty(self) -> tuple[Tensor, Tensor]:
        """The empty prompt; shorter than the others."""
        return self._text(99, 5)

    def drawn(self, chance: random.Random) -> Any:
        """One of them."""
        return self.pair(chance.randrange(self.count))

    def pair(self, index: int) -> Any:
        """One of them."""
        generator = torch.Generator().manual_seed(index)
        low, high = torch.randn(6, LOW, generator=generator), torch.randn(HIGH, generator=generator)
        latent = self.family.latent(seed=index)[0]
        return self.make(low, high, latent, *self._text(index, 12), index % 2 == 0)

    def _text(self, seed: int, tokens: int) -> tuple[Tensor, Tensor]:
        ((text, entries),) = self.family.prompt(seed, tokens=tokens)
        return text[0], entries["pooled_output"][0]


def maker(pack: ModuleType, tiny_model: Callable[[str], Any]) -> Make:
    """What makes trainers of adapters for a family's tiny model."""
    kinds, training = pack.nodes.host.flexip_settings, pack.nodes.host.flexip_training

    def trainer(
        family: Family = FAMILIES["SD3"],
        state: Path | None = None,
        watch: Any = None,
        network: Any = None,
        pairs: int = 2,
        save_every: int = 500,
        accelerator: Any = None,
        resume: bool = True,
        **changed: Any,
    ) -> Any:
        model = tiny_model(family.model)
        network = network or training.new_network(model, LOW, HIGH, family.text_width, **SIZES)
        settings = kinds.TrainingSettings(**{**QUICK, **changed})
        source = RandomPairs(kinds.Pair, family, pairs)
        return training.Trainer(
            model, network, source, settings, state, save_every, watch, accelerator, resume=resume
        )

    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    """What a trainer's adapter has learned so far."""
    return {key: t.detach().clone() for key, t in trainer.network.state_dict().items()}


def require_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Two adapters' weights are the same to the last bit."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def encoder(kind: str, width: int = 64) -> Any:
    """A tiny image encoder with random weights: "dinov2" or "clip_vision_model"."""
    config = {"dinov2": tiny_encoders.DINO, "clip_vision_model": tiny_encoders.CLIP}[kind]
    return tiny_encoders.built({**config, "hidden_size": width, "num_attention_heads": 1})


def picture(seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """Coarse coloured noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def folder(root: Path, *, invariant: int = 2, subjects: int = 2) -> Path:
    """Write pictures with captions; the first subject's first picture has a mask."""
    names = [f"invariant/{i}" for i in range(invariant)]
    names += [f"variant/{name}/{i}" for name in "ab"[:subjects] for i in range(2)]
    for seed, name in enumerate(names):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
        path.with_suffix(".txt").write_text(f"portrait number {seed}", "utf-8")
    if subjects:
        mask = Image.new("L", (80, 64))
        mask.paste(255, (20, 10, 60, 50))
        mask.save(root / "variant" / "a" / "0.mask.png")
    return root
