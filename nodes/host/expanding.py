"""For nodes that expand into others."""

from __future__ import annotations

import importlib
from typing import Any

from comfy_execution.graph_utils import GraphBuilder

Link = list[str | int]
"""An input as the graph holds it, [node id, slot]."""


def add(graph: GraphBuilder, node_id: str, **inputs: Any) -> Any:
    """Add one of the pack's nodes; widgets that are not given have their defaults."""
    # To a type checker, a plain import of `nodes` would be of our own.
    known: Any = importlib.import_module("nodes")
    widgets = known.NODE_CLASS_MAPPINGS[node_id].define_schema().inputs
    defaults = {w.id: w.default for w in widgets if getattr(w, "default", None) is not None}
    return graph.node(node_id, **{**defaults, **inputs})
