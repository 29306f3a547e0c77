"""How a prompt can end badly, the same for the server and the in-process executor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Graph = dict[str, dict[str, Any]]
Outputs = dict[str, dict[str, Any]]


class PromptRejected(Exception):
    """The graph did not validate; `node_errors` is ComfyUI's answer, by node id."""

    def __init__(self, error: Mapping[str, Any], node_errors: Mapping[str, Any]) -> None:
        self.error = dict(error)
        self.node_errors = dict(node_errors)
        reasons = [
            f"{entry['class_type']} ({node}): {reason['message']}: {reason['details']}"
            for node, entry in self.node_errors.items()
            for reason in entry["errors"]
        ]
        super().__init__("; ".join(reasons) or f"{error.get('message')}: {error.get('details')}")


class PromptFailed(Exception):
    """A node raised; its id, class, exception type, message and traceback are attributes."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.node_id: str = data["node_id"]
        self.node_type: str = data["node_type"]
        self.exception_type: str = data["exception_type"]
        self.message: str = data["exception_message"].strip()
        self.traceback = "".join(data["traceback"])
        super().__init__(
            f"{self.node_type} ({self.node_id}): {self.exception_type}: {self.message}"
        )


class PromptInterrupted(Exception):
    """The prompt was interrupted while a node ran."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.node_id: str = data["node_id"]
        self.node_type: str = data["node_type"]
        super().__init__(f"interrupted at {self.node_type} ({self.node_id})")


# The messages that tell of a prompt's bad end, and the exceptions they stand for.
FAILURES = {"execution_error": PromptFailed, "execution_interrupted": PromptInterrupted}
