"""Who is in a portrait: attributes that a caption names, and an identity that no caption names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

attributes: dict[str, tuple[str, ...]] = {
    "hair length": ("short", "long", "bald"),
    "hair": ("black", "brown", "blond", "red", "white", "blue", "green"),
    "skin": ("pale", "tan", "brown", "dark"),
    "eyes": ("brown", "blue", "green"),
    "eyewear": ("no", "round", "dark"),
    "expression": ("smiling", "neutral", "sad", "surprised"),
    "lips": ("natural", "red", "purple"),
    "beard": ("no", "full"),
    "hat": ("no", "red", "blue", "green", "yellow", "black"),
    "shirt": ("red", "blue", "green", "yellow", "white", "purple", "orange", "gray"),
    "background": ("blue", "green", "gray", "pink", "yellow", "orange", "white", "purple"),
}
"""Attribute -> the values that a caption can name (1 row of the vocabulary each)."""

identity_ranges: dict[str, tuple[float, float]] = {
    "center x": (-0.06, 0.06),
    "center y": (-0.04, 0.06),
    "face width": (0.40, 0.50),
    "face height": (0.52, 0.62),
    "jaw": (0.00, 0.28),
    "eye distance": (0.185, 0.235),
    "eye size": (0.085, 0.115),
    "eye height": (-0.12, -0.03),
    "brow thickness": (0.016, 0.034),
    "brow tilt": (-0.25, 0.25),
    "nose length": (0.11, 0.19),
    "nose width": (0.035, 0.065),
    "mouth height": (0.29, 0.35),
    "mouth width": (0.13, 0.19),
    "mole x": (-0.28, 0.28),
    "mole size": (0.0, 0.035),
}
"""Identity parameter -> range, in units of half the picture's width (y points down)."""


@dataclass(frozen=True)
class Portrait:
    """One person: `attributes` by name, and `identity` in the order of `identity_ranges`."""

    attributes: dict[str, str]
    identity: tuple[float, ...]

    def having(self, attribute: str, value: str) -> Portrait:
        """The same person with one attribute changed."""
        return replace(self, attributes={**self.attributes, attribute: value})


def sample(rng: random.Random) -> Portrait:
    """Draw a person: attributes uniformly (half wear no hat), identity uniformly in its ranges."""
    chosen = {name: rng.choice(values) for name, values in attributes.items()}
    if rng.random() < 0.4:
        chosen["hat"] = "no"
    identity = [rng.uniform(low, high) for low, high in identity_ranges.values()]
    if rng.random() < 0.5:
        identity[-1] = 0.0
    return Portrait(chosen, tuple(identity))


def phrase(attribute: str, portrait: Portrait) -> str:
    """How a caption names one attribute; hair length and colour share one phrase."""
    value = portrait.attributes[attribute]
    if attribute in ("hair length", "hair"):
        length = portrait.attributes["hair length"]
        return "a bald head" if length == "bald" else f"{length} {portrait.attributes['hair']} hair"
    nouns = {"eyewear": "glasses", "expression": "face"}
    return f"{value} {nouns.get(attribute, attribute)}"


phrase_order = [name for name in attributes if name != "hair length"]


def caption(portrait: Portrait, named: Sequence[str] = phrase_order) -> str:
    """The prompt that describes a portrait by the attributes in `named`.

    Every phrase has a fixed number of words, so two captions that differ in one attribute have
    the same length.
    """
    return ", ".join(["portrait of a person", *(phrase(name, portrait) for name in named)])
