"""What the training scripts share: resumable state, averaging, schedule and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Trainer:
    """Adam with warm-up and cosine decay, an exponential average, and a state file to resume from.

    Args:
        model: trained in place.
        steps: length of the whole run; the learning rate ends near zero there.
        rate: peak learning rate.
        state: file that holds parameters, average, moments and step; written every `save_every`
            steps and read back when it exists.
    """

    def __init__(
        self, model: nn.Module, steps: int, rate: float, state: Path, save_every: int = 500
    ):
        self.model, self.steps, self.rate = model, steps, rate
        self.state, self.save_every = state, save_every
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.step = 0
        if state.exists():
            self._load()

    def run(self, watch: str = "loss") -> Iterator[int]:
        """Yield step numbers until done; call `descend` with the loss of each."""
        started, first = time.monotonic(), self.step
        self._sum, self._count = 0.0, 0
        while self.step < self.steps:
            # A seed for each step: a resumed run goes on with the noise it would have had.
            torch.manual_seed(self.step)
            yield self.step
            self.step += 1
            if self.step % 100 == 0:
                elapsed = time.monotonic() - started
                left = elapsed / (self.step - first) * (self.steps - self.step)
                mean = self._sum / max(1, self._count)
                print(
                    f"step {self.step}/{self.steps}  {watch} {mean:.4f}  {left / 60:.1f} min left",
                    flush=True,
                )
                self._sum, self._count = 0.0, 0
            if self.step % self.save_every == 0 or self.step == self.steps:
                self._save()

    def descend(self, loss: Tensor, shown: float | None = None) -> None:
        """One optimiser step; `shown` is what the progress line averages (default: the loss)."""
        progress = self.step / self.steps
        warm = min(1.0, (self.step + 1) / 200)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.005)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        decay = min(0.999, (self.step + 1) / (self.step + 20))
        averages = [self.average[name] for name in self.parameters]
        torch._foreach_lerp_(averages, [p.detach() for p in self.parameters.values()], 1 - decay)
        self._sum += loss.item() if shown is None else shown
        self._count += 1

    def _save(self) -> None:
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"first.{name}"] = moments["exp_avg"]
            tensors[f"second.{name}"] = moments["exp_avg_sq"]
        part = self.state.with_suffix(".part")
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, part)
        part.replace(self.state)

    def _load(self) -> None:
        tensors = load_file(self.state)
        self.step = int(tensors["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"first.{name}"],
                    "exp_avg_sq": tensors[f"second.{name}"],
                }
        print(f"resuming at step {self.step} from {self.state}", flush=True)
