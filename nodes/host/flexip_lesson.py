"""What the attentions of a model in training see of references, and the gradients of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels.flexip import FlexIP, Gated, Mode, gated_attention
from . import tap
from .adapters import block_key
from .tap import Attention, Proceed


class Lesson:
    """Adds to the attentions of the model in training what they see of a batch's references.

    The model's gradients end at the keys and values, and `backward` leads them on through the
    adapter: blocks that are computed twice would go through it once each.

    Args:
        low: (B, P, W), and
        high: (B, C), of the references.
        gamma: (B,).
    """

    def __init__(self, network: FlexIP, low: Tensor, high: Tensor, gamma: Tensor, mode: Mode):
        self.network, self.low, self.high = network, low, high
        self.gains, self.mode = (gamma, 1 - gamma), mode
        self._made: dict[str, tuple[Gated, Gated]] = {}
        self._seen: dict[str, list[Gated]] = {}

    def wrappers(self, model: ModelPatcher) -> list[Callable[..., Tensor]]:
        """Of a model's call."""
        return [self._read, tap.wrapper_of(model, self, replaced=True)]

    def backward(self) -> None:
        """Lead the gradients of the keys and values on to the adapter."""
        made, grads = [], []
        for block, seen in self._seen.items():
            for whole, leaves in zip(self._made[block], seen, strict=True):
                for tensor, leaf in zip(whole, leaves, strict=True):
                    if leaf.grad is not None:
                        made.append(tensor)
                        grads.append(leaf.grad)
        torch.autograd.backward(made, grads)

    def _read(self, executor: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Read references and captions before any block runs, as blocks may run twice."""
        text = args[3] if len(args) > 3 else kwargs["c_crossattn"]
        self._made = self.network(self.low, self.high, text.float())
        self._seen = {
            block: [Gated(*(t.detach().requires_grad_() for t in gated)) for gated in branches]
            for block, branches in self._made.items()
        }
        return executor(*args, **kwargs)

    def __call__(self, attention: Attention, proceed: Proceed) -> Tensor:
        """See `tap.Handler`."""
        out, place = proceed(attention), attention.place
        if place.text is None:
            return out
        branches = [
            Gated(gated.keys.to(out), gated.values.to(out))
            for gated in self._seen[block_key(place.block)]
        ]
        q = attention.q[:, :, place.image]
        added = gated_attention(q, branches, self.gains, self.mode)
        before, after = out[:, : place.image.start], out[:, place.image.stop :]
        return torch.cat([before, out[:, place.image] + added, after], 1)
