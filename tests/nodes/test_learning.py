"""Learn Identity: what it learns from, how it learns, and what it leaves behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock, tiny_clip
from host.inprocess import Host

TinyModel = Callable[[str], Any]

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
    confine_word=True,
    outside_weight=1.0,
    weighting="uniform",
    seed=3,
    vectors=1,
    start_word="",
    update_every=2,
    resolution=512,
    precision="auto",
    preview_every=0,
)
LISTS = ("image", "mask", "prompt")


def learn(demo: stock.Demo, model: Any, clip: Any, image: Any, **changed: Any) -> tuple[Any, ...]:
    """Run the node as ComfyUI does: every input is a list."""
    inputs = {**SETTINGS, "model": model, "clip": clip, "vae": demo.vae, "image": image, **changed}
    lists = {k: v if k in LISTS and isinstance(v, list) else [v] for k, v in inputs.items()}
    return stock.call("PinpointLearnIdentity", **lists)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """(1, 64, 64, 3)."""
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def learned(demo: stock.Demo, tiny_model: TinyModel, picture: Tensor) -> Callable[..., Any]:
    """Learns on a tiny SD3; returns the node's outputs."""

    def run(image: Any = picture, **changed: Any) -> tuple[Any, ...]:
        return learn(demo, tiny_model("sd3_bare"), tiny_clip.clip(), image, **changed)

    return run


def test_learns_word_and_change(learned: Callable[..., Any]) -> None:
    identity, preview, curve, report = learned()
    assert (identity.name, identity.class_word, identity.family) == ("ann", "person", "SD3")
    assert {k: v.shape for k, v in identity.vectors.items()} == {"l": (1, 64)}
    ups = [t for key, t in identity.lora.items() if key.endswith("lora_up.weight")]
    assert len(ups) == 7
    assert all(up.shape[1] == 2 and up.any() for up in ups)
    assert preview.shape == (1, 64, 64, 3)
    assert curve.shape == (1, 300, 600, 3)
    assert "4 steps" in report
