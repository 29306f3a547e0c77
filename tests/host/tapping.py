"""Model families as an attention tap has to see them, written down by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny

from . import stock
from .edits import picture_latent

Grid = tuple[int, int, int]

WORDS = 12
"""Tokens of a prompt."""
ROWS, COLUMNS = 7, 9
"""Of a latent: odd, so that models with patches of 2x2 have to lengthen it."""
_JOINT_2 = ("joint 0 joint", "joint 1 joint")
_FLUX = ("double 0 joint", "single 0 joint")
_QWEN = ("double 0 joint", "double 1 joint")
_LUMINA = ("layer 0 joint", "layer 1 joint")
_WAN = ("layer 0 self", "layer 0 cross", "layer 1 self", "layer 1 cross")
_SD15 = ("input 1", "output 0", "output 1")
_SDXL_FINE = ("input 3", "output 2", "output 3")
_SDXL = (
    *("input 3", "input 5", "input 5.1", "middle 0", "middle 0.1", "output 0", "output 0.1"),
    *("output 1", "output 1.1", "output 2", "output 3"),
)


def _both(blocks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block} {kind}" for block in blocks for kind in ("self", "cross"))


@dataclass(frozen=True)
class Family:
    """One way to run one model, and what a call of it is to show.

    Attributes:
        model: name of a tiny model.
        seen: attentions in order, each as "block kind".
        text: the prompt's tokens among the keys of joint and cross attentions.
        words: the part of them that is no padding.
        start: the picture's first token.
        grid: frames, rows and columns of the picture's tokens.
        grids: of blocks with another grid.
        padding: how many tokens after the picture are made from it, or may be.
        channels, frames: of the latent; with frames it is 5-D.
        extras: what else the conditioning holds, made from a seed.
    """

    model: str
    seen: tuple[str, ...]
    text: range = range(WORDS)
    words: range = range(WORDS)
    start: int = WORDS
    grid: Grid = (1, 4, 5)
    grids: dict[str, Grid] = field(default_factory=dict)
    padding: int = 0
    channels: int = tiny.latent_channels
    frames: int | None = None
    text_width: int = tiny.text_width
    extras: Callable[[int], dict[str, Any]] | None = None

    def latent(self, batch: int = 1, seed: int = 31) -> Tensor:
        """A latent that the model can be asked about."""
        frames = () if self.frames is None else (self.frames,)
        return picture_latent(batch, *frames, ROWS, COLUMNS, channels=self.channels, seed=seed)

    def prompt(self, seed: int, extras: int = 0, tokens: int = WORDS) -> stock.Conditioning:
        """A prompt whose text depends on one seed, and its extras on another."""
        ((_, entries),) = stock.conditioning(0)
        ((text, _),) = stock.conditioning(seed, tokens, self.text_width)
        more = {} if self.extras is None else self.extras(extras)
        return [[text, {**entries, **more}]]

    def velocity(self, model: Any, sigma: float = 0.6) -> Tensor:
        """Guided velocity of two pictures, both prompts in one call."""
        return stock.velocity(model, self.prompt(1), self.prompt(2), 2.0, self.latent(2), sigma)

    def grid_of(self, block: str) -> Grid:
        """The grid of the picture's tokens in a block."""
        return self.grids.get(block, self.grid)

    def image_of(self, block: str, kind: str) -> range:
        """The picture's tokens among a block's queries."""
        # SD3.5-medium attends to the picture a second time, alone.
        start = 0 if kind == "self" and "joint" in block else self.start
        return range(start, start + math.prod(self.grid_of(block)))


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _references(*shapes: tuple[int, ...]) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"reference_latents": [_random(seed, 1, *shape) for shape in shapes]}


def _texts(*lengths: int) -> Callable[[int], dict[str, Any]]:
    """Two reference pictures for Lumina 2, with texts of these lengths."""
    pictures = _references((16, 6, 8), (16, 4, 4))

    def extras(seed: int) -> dict[str, Any]:
        texts = [_random(seed, 1, length, tiny.text_width) for length in lengths]
        return {**pictures(seed), "reference_latents_text_embeds": texts}

    return extras


def _clip_vision(seed: int) -> dict[str, Any]:
    seen = SimpleNamespace(penultimate_hidden_states=_random(seed, 1, 257, 1280))
    return {"clip_vision_output": seen}


_wan: dict[str, Any] = dict(start=0, grid=(3, 4, 5), frames=3)
_unet: dict[str, Any] = dict(start=0, channels=4)
_flux2: dict[str, Any] = dict(
    text=range(512), words=range(500, 512), start=512, grid=(1, ROWS, COLUMNS), channels=128
)

FAMILIES: dict[str, Family] = {
    "SD3": Family("sd3", _JOINT_2),
    "SD3.5": Family("sd35_large", _JOINT_2),
    "SD3.5-medium": Family("sd35", ("joint 0 joint", "joint 0 self", "joint 1 joint")),
    "Flux": Family("flux", _FLUX),
    "Flux schnell": Family("schnell", _FLUX),
    "Flux Kontext with references": Family(
        "flux", _FLUX, extras=_references((16, 5, 8), (16, 7, 4))
    ),
    "Flux.2": Family("flux2", _FLUX, **_flux2),
    "Flux.2 with a reference": Family("flux2", _FLUX, **_flux2, extras=_references((128, 3, 4))),
    "Chroma": Family(
        "chroma", ("double 0 joint", "double 1 joint", "single 0 joint", "single 1 joint")
    ),
    "Qwen-Image": Family("qwen", _QWEN, frames=1),
    "Qwen-Image-Layered": Family("qwen", _QWEN, frames=3, grid=(3, 4, 5)),
    "Qwen-Image with a reference": Family(
        "qwen", _QWEN, frames=1, extras=_references((16, 1, 5, 8))
    ),
    "Qwen-Image-Edit with references": Family(
        "qwen_edit", _QWEN, frames=1, extras=_references((16, 1, 5, 8), (16, 1, 3, 3))
    ),
    "Lumina 2": Family("lumina2", _LUMINA),
    "Lumina 2 with references": Family(
        # Texts of 4 and 5, the prompt, references of 12 and 4 tokens. After a text behind the
        # prompt's, ComfyUI 0.30.0 can run one row only.
        *("lumina2_bare", _LUMINA, range(9, 21), range(9, 21), 37),
        extras=_texts(4, 5),
    ),
    "Z-Image": Family("zimage", _LUMINA, text=range(32), start=32, padding=12),
    "Z-Image with references": Family(
        # Two texts, of which one is empty, the prompt and two references, each padded to 32.
        *("zimage_bare", _LUMINA, range(64, 96), range(64, 76), 160),
        extras=_texts(4),
    ),
    "Wan": Family("wan", _WAN, **_wan),
    "Wan I2V": Family("wan_i2v", _WAN, **_wan, extras=_clip_vision),
    "Wan with a reference before": Family(
        "wan_reference",
        _WAN,
        **{**_wan, "start": 20},
        extras=_references((16, 1, 8, 10)),
    ),
    "Wan with references after": Family(
        "wan",
        _WAN,
        **_wan,
        extras=lambda seed: {
            "time_dim_concat": _random(seed, 1, 16, 1, ROWS, COLUMNS),
            "context_latents": [_random(seed, 1, 16, 1, 4, 4)],
        },
    ),
    "SD1.5": Family("sd15", _both(_SD15), **_unet, grid=(1, ROWS, COLUMNS), text_width=768),
    "SDXL": Family(
        "sdxl",
        _both(_SDXL),
        **_unet,
        grid=(1, 2, 3),
        grids=dict.fromkeys(_SDXL_FINE, (1, 4, 5)),
    ),
}


def each_of(*names: str) -> pytest.MarkDecorator:
    """Runs a test with each of some families."""
    return pytest.mark.parametrize("family", [pytest.param(FAMILIES[n], id=n) for n in names])


families = each_of(*FAMILIES)
few = each_of("SD3", "Flux", "SD1.5", "SDXL")
"""Of each kind of attention one or two: joint, in two streams or one, and UNets'."""


class Witness:
    """An observer of a tap that keeps what it sees."""

    def __init__(self) -> None:
        self.attentions: list[Any] = []

    def __call__(self, attention: Any) -> None:
        """Keep an attention, its tensors as they are now."""
        tensors = {name: getattr(attention, name).clone() for name in "qkv"}
        self.attentions.append(replace(attention, **tensors))

    @property
    def names(self) -> list[str]:
        """What was seen, each as "block kind"."""
        return [f"{a.place.block} {a.place.kind}" for a in self.attentions]

    def calls(self) -> Iterator[Witness]:
        """What was seen in each call of the model."""
        kept: dict[int, Witness] = {}
        for attention in self.attentions:
            kept.setdefault(id(attention.call), Witness()).attentions.append(attention)
        yield from kept.values()
