"""The time that a model's sampling takes, step by step."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor


class Clock:
    """Takes the time between the steps of a model's samplings.

    Attributes:
        model: a clone that is watched.
        steps: seconds from one step's beginning to the next one's.
    """

    def __init__(self, model: Any):
        self.steps: list[float] = []
        self.model = model.clone()
        self.model.add_wrapper_with_key("predict_noise", "clock", self._tick)
        self._last = 0.0

    def _tick(self, executor: Any, x: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
        now, levels = time.perf_counter(), rest[0]["transformer_options"]["sample_sigmas"]
        # What is made once is made in the first step.
        if (levels > timestep.max()).sum() > 1:
            self.steps.append(now - self._last)
        self._last = now
        return executor(x, timestep, *rest)
