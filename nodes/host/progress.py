"""Text on a node while it works and after."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context
from server import PromptServer

log = logging.getLogger(__name__)


def show(text: str) -> None:
    """Write on the node that is at work; the page draws no other text on nodes like ours."""
    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)


def warn(text: str) -> None:
    """Say in the log and on the node that a setting has no effect."""
    log.warning(f"Pinpoint: {text}")
    show(text)
