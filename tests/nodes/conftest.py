"""What several files of tests share."""

from __future__ import annotations

from types import ModuleType

import pytest

from host import lessons, stock


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
