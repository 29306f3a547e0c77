"""Null-text inversions for tests, each through the nodes of the pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tiny

from . import stock
from .edits import picture_latent
from .inversions import sample

MODELS = ("sd15", "sdxl")
"""Tiny models that predict noise."""


def prompts_for(name: str) -> tuple[stock.Conditioning, stock.Conditioning]:
    """A source and a negative prompt, not further apart than guidance 7.5 allows."""
    width = 768 if name == "sd15" else tiny.text_width
    source, other = (stock.conditioning(seed, width=width) for seed in (1, 3))
    (text, entries), (away, _) = source[0], other[0]
    return source, [[text + 0.1 * (away - text), entries]]


@dataclass(frozen=True)
class NullText:
    """All settings of a Null-Text Inversion; `replace` makes another."""

    model: Any
    source: stock.Conditioning
    negative: stock.Conditioning
    latent: Tensor = field(default_factory=lambda: picture_latent(1, 6, 5, channels=4))
    schedule: tuple[float, ...] = (1.0, 0.6, 0.25, 0.0)
    guidance: float = 7.5
    inner_steps: int = 2
    learning_rate: float = 0.01
    early_stop: float = 1.0

    def having(self, **changes: Any) -> NullText:
        """The same inversion with other settings."""
        return replace(self, **changes)

    @property
    def sigmas(self) -> Tensor:
        """The schedule as it goes on a wire."""
        return torch.tensor(self.schedule)

    def widgets(self) -> dict[str, Any]:
        """The inputs that are values."""
        names = ("guidance", "inner_steps", "learning_rate", "early_stop")
        return {name: getattr(self, name) for name in names}

    def wires(self) -> dict[str, Any]:
        """The inputs that come by wire."""
        prompts = {"source": self.source, "negative": self.negative}
        things = {"model": self.model, "sigmas": self.sigmas, "latent": {"samples": self.latent}}
        return {**things, **prompts}

    def run(self) -> tuple[Any, dict[str, Tensor], Any, str]:
        """Noise, the noise as a latent, trajectory and report."""
        return stock.call("PinpointNullTextInversion", **self.wires(), **self.widgets())

    def replaying(self, trajectory: Any, **changes: Any) -> Any:
        """A GUIDER from the Null-Text Guider node, with the source prompt."""
        given = dict(model=self.model, positive=self.source, guidance=self.guidance, **changes)
        return stock.call("PinpointNullTextGuider", trajectory=trajectory, **given)[0]

    def plain(self) -> Any:
        """ComfyUI's guider with the same prompts."""
        prompts = dict(positive=self.source, negative=self.negative)
        return stock.call("CFGGuider", model=self.model, cfg=self.guidance, **prompts)[0]

    def back(self, noise: Any, guider: Any, sampler: str = "euler") -> Tensor:
        """The latent that a stock sampler leads to."""
        chosen = stock.call("KSamplerSelect", sampler_name=sampler)[0]
        return sample(
            self.model, self.latent, chosen, sigmas=self.sigmas, noise=noise, guider=guider
        )

    def error(self, found: Tensor) -> float:
        """Distance from the latent, as a part of its size."""
        return float((found - self.latent).norm() / self.latent.norm())


def null_text_for(model: Any, name: str, **settings: Any) -> NullText:
    """A null-text inversion with a tiny model."""
    return NullText(model, *prompts_for(name), **settings)


class Inverted(NamedTuple):
    """A null-text inversion, and what came of it."""

    job: NullText
    noise: Any
    trajectory: Any


@cache
def inverted(tiny_model: Callable[[str], Any], name: str) -> Inverted:
    """The same inversion with a tiny model for all tests that only look at it."""
    job = null_text_for(tiny_model(name), name)
    noise, _, trajectory, _ = job.run()
    return Inverted(job, noise, trajectory)


def predicted(job: NullText, x: Tensor, sigma: float) -> Tensor:
    """Noise that the source prompt predicts, by ComfyUI's own guider."""
    return stock.velocity(job.model, job.source, None, 1.0, x, sigma)
