"""Short ways to write graphs for tests, with any Python object on their wires."""

from __future__ import annotations

from typing import Any

from .prompts import Graph


class Wire(list):
    """A link to an output of a node, in the form that graphs have it: [node id, slot]."""

    def __init__(self, node_id: str, slot: int = 0):
        super().__init__([node_id, slot])

    @property
    def node_id(self) -> str:
        """The node whose output this is."""
        return self[0]

    def out(self, slot: int) -> Wire:
        """Another output of the same node."""
        return Wire(self.node_id, slot)


class NodeGraph:
    """A graph being written: `add` a node, and give the wire it returns to the next one."""

    def __init__(self) -> None:
        self.nodes: Graph = {}

    def add(self, class_type: str, **inputs: Any) -> Wire:
        """Add a node; an input is a value or a wire."""
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = {"class_type": class_type, "inputs": inputs, "_meta": {}}
        return Wire(node_id)

    def find(self, class_type: str) -> str:
        """The id of the only node of a class."""
        (node_id,) = (i for i, node in self.nodes.items() if node["class_type"] == class_type)
        return node_id

    def give(self, thing: Any) -> Wire:
        """A wire that carries a Python object; in-process graphs only."""
        key = f"{type(thing).__name__} {len(Given.things)}"
        Given.things[key] = thing
        return self.add("TestsGiven", key=key)

    def keep(self, wire: Wire) -> Wire:
        """End a graph in a wire, so that its value is computed; in-process graphs only."""
        self.add("TestsKept", thing=wire)
        return wire


class _Anything(str):
    """A wire type that fits all others: it is unequal to none."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


class Given:
    """A node that returns an object which a test made."""

    things: dict[str, Any] = {}  # noqa: RUF012
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "give", (_Anything("*"),)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        return {"required": {"key": ("STRING", {})}}

    def give(self, key: str) -> tuple[Any]:
        """The object that the key stands for."""
        return (self.things[key],)


class Kept:
    """An output node for any wire."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "keep", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        return {"required": {"thing": (_Anything("*"), {})}}

    def keep(self, thing: Any) -> dict[str, Any]:  # noqa: ARG002
        """Do nothing: ComfyUI keeps what its nodes return."""
        return {}


NODES = {"TestsGiven": Given, "TestsKept": Kept}
