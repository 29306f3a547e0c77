"""Lessons for tests: Learn Identity on a tiny SD3, with settings that take a second."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import stock, tiny_clip

TinyModel = Callable[[str], Any]
Learned = Callable[..., tuple[Any, ...]]
"""Learns with changed settings; returns the node's outputs."""

SETTINGS: dict[str, Any] = dict(
    prompt="a person with red hair",
    name="ann",
    class_word="person",
    attributes="hair, smile",
    token_steps=2,
    token_rate=0.02,
    steps=2,
    rate=1e-3,
    rank=2,
    batch=2,
    orthogonality=0.1,
    preservation=1.0,
    confine_word=True,
    outside_weight=1.0,
    weighting="uniform",
    seed=3,
    vectors=1,
    start_word="",
    update_every=2,
    resolution=512,
    precision="auto",
    save_memory=False,
    preview_every=0,
)
LISTS = ("image", "mask", "prompt")
PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))


def learner(demo: stock.Demo, tiny_model: TinyModel) -> Learned:
    """Learns on a tiny SD3 as ComfyUI runs the node: every input is a list."""

    def run(image: Any = PICTURE, **changed: Any) -> tuple[Any, ...]:
        given = {"model": tiny_model("sd3_bare"), "clip": tiny_clip.clip(), "vae": demo.vae}
        inputs = {**SETTINGS, **given, "image": image, **changed}
        lists = {k: v if k in LISTS and isinstance(v, list) else [v] for k, v in inputs.items()}
        return stock.call("PinpointLearnIdentity", **lists)

    return run


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All tensors are equal to the last bit."""
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def loss_of(outputs: tuple[Any, ...]) -> float:
    """The loss at the end, from the report."""
    return number_in(outputs[3], r"([\d.]+) at the end")


def number_in(report: str, pattern: str) -> float:
    """What a pattern's group finds in a report."""
    (found,) = re.findall(pattern, report)
    return float(found)
