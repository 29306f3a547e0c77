"""Reproducible sets of people and of edits; no split ever meets another."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .drawing import draw
from .people import Portrait, attributes, caption, identity_ranges, sample

change_threshold = 6 / 255
"""A pixel is edited when any of its colours differs by more than this."""
smallest_change = 96
"""An edit must change at least this many pixels at 128x128, or it cannot be seen."""


def people(split: str, seed: int, count: int) -> list[Portrait]:
    """Draw people. Splits ("train", "held-out", ...) and seeds give independent streams."""
    rng = random.Random(f"{split}:{seed}")
    return [sample(rng) for _ in range(count)]


@dataclass(frozen=True)
class Edit:
    """One attribute change of one person, with the pictures that the drawer gives for it."""

    source: Portrait
    target: Portrait
    attribute: str

    @property
    def prompts(self) -> tuple[str, str]:
        """Source and target caption."""
        return caption(self.source), caption(self.target)


def edited_pixels(source: Tensor, target: Tensor) -> Tensor:
    """The exact mask of a change: (B, 3, H, W) twice -> (B, H, W) of 0 and 1."""
    return ((source - target).abs().amax(1) > change_threshold).float()


def edits(split: str, seed: int, count: int) -> list[Edit]:
    """Draw edits, the attributes in turn, each one large enough to be seen."""
    rng = random.Random(f"{split}:edits:{seed}")
    found: list[Edit] = []
    while len(found) < count:
        attribute = list(attributes)[len(found) % len(attributes)]
        person = sample(rng)
        value = rng.choice([v for v in attributes[attribute] if v != person.attributes[attribute]])
        edit = Edit(person, person.having(attribute, value), attribute)
        if edit.prompts[0] == edit.prompts[1]:
            continue
        if edited_pixels(draw([edit.source]), draw([edit.target])).sum() >= smallest_change:
            found.append(edit)
    return found


def views(person: Portrait, rng: random.Random, count: int) -> list[Portrait]:
    """Portraits of one person with other attributes and at other places of the picture."""
    found = []
    for _ in range(count):
        other = sample(rng)
        kept, moved = (dict(zip(identity_ranges, p.identity, strict=True)) for p in (person, other))
        placed = {**kept, "center x": moved["center x"], "center y": moved["center y"]}
        found.append(replace(other, identity=tuple(placed.values())))
    return found


def pictures(portraits: list[Portrait], size: int = 128, chunk: int = 64) -> Tensor:
    """Draw many portraits as (N, 3, size, size) uint8."""
    parts = [draw(portraits[i : i + chunk], size) for i in range(0, len(portraits), chunk)]
    return torch.cat([(part * 255).round().byte() for part in parts])


def demo_case(seed: int = 0) -> tuple[np.ndarray, str, str]:
    """A held-out portrait as (H, W, 3) uint8 with a source and a target prompt.

    The attributes come in turn with the seed, starting with the hat.
    """
    turn = list(attributes).index("hat") + seed
    edit = edits("demo", seed, 1 + turn % len(attributes))[-1]
    return pictures([edit.source])[0].permute(1, 2, 0).numpy(), *edit.prompts
