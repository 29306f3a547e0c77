"""The example workflows, and what they save when a server runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from .cases import saved_pictures
from .options import REAL_WEIGHTS, WORKFLOWS
from .prompts import Graph
from .server import Server

Workflow = dict[str, Any]
Pictures = dict[str, np.ndarray]

NAMES = sorted(file.stem for file in WORKFLOWS.glob("*.json"))
DEMOS = [name for name in NAMES if name not in REAL_WEIGHTS]


@cache
def load(name: str) -> Workflow:
    """A workflow as the web page saves it."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))


def run(server: Server, name: str, change: Callable[[Graph], None] = lambda _: None) -> Pictures:
    """What a workflow saves, by the last part of its prefix.

    `change` may lower widgets of the graph first.
    """
    graph = server.convert(load(name))
    change(graph)
    saved = saved_pictures(server, graph, server.run(graph))
    prefixes = [
        node["inputs"]["filename_prefix"]
        for node in graph.values()
        if node["class_type"] == "SaveImage"
    ]
    assert sorted(prefixes) == sorted(f"pinpoint/{name}" for name in saved)
    return {name: np.asarray(picture) for name, picture in saved.items()}
