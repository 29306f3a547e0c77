"""What stops a run in a chosen call of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Trap:
    """A wrapper that springs once, in a given call of the model counted from 1."""

    def __init__(self, spring: Callable[[], None]):
        self.spring, self.calls_left = spring, 0

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A wrapper of the model call."""
        self.calls_left -= 1
        if self.calls_left == 0:
            self.spring()
        return executor(*args, **kwargs)


def interrupt() -> None:
    """As the web page's button does."""
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
