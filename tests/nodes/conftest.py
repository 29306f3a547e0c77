"""What several files of tests share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from host import identities, lessons, stock
from host.subjects import Case


@pytest.fixture
def learned(
    demo: stock.Demo,
    tiny_model: lessons.TinyModel,
    pack: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> lessons.Learned:
    """Learns with changed settings; the preview is quick."""
    monkeypatch.setattr(pack.nodes.host.lessons, "preview_steps", 2)
    return lessons.learner(demo, tiny_model)


@pytest.fixture
def case(pack: ModuleType, tiny_model: lessons.TinyModel) -> Callable[..., Case]:
    """Makes a family's tiny model with an adapter and a subject."""
    return lambda family, **more: Case(pack, tiny_model(family.model), family, **more)


@pytest.fixture
def ann(pack: ModuleType) -> Any:
    """An identity for the tiny SD3 with its CLIP-L, with a word and a change of the model."""
    return identities.ann(pack)
