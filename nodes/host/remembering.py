"""What a model said of a source picture, kept for the next edit of it.

Where a source is evaluated depends on picture, noise and schedule, not on the target prompt: a
second edit of the same picture asks the same again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from . import values

limit = 256 * 2**20
"""Bytes kept for a model at most."""
_own = "pinpoint"
"""What the keys of our own wrappers begin with; none of them keeps anything from call to call."""
hooks = (
    *("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"),
    *("sampler_calc_cond_batch_function", "model_function_wrapper"),
    *("context_handler", "multigpu_clones"),
)
"""Options by which other packs may change a call depending on the calls before it."""
_plain = str | bytes | int | float | None


class SourceMemory:
    """Answers by what was asked; the ones longest not asked for go first.

    Attributes:
        size: in bytes.
    """

    def __init__(self, limit: int = limit):
        self.size, self._limit = 0, limit
        self._answers: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        """What was kept, on the CPU."""
        if key in self._answers:
            self._answers.move_to_end(key)
        return self._answers.get(key)

    def keep(self, key: bytes, answer: Tensor) -> None:
        """Keep an answer, if it is not larger than all that may be kept."""
        kept = answer.detach().cpu().clone()
        if kept.nbytes > self._limit:
            return
        self._answers[key] = kept
        self.size += kept.nbytes
        while self.size > self._limit:
            _, oldest = self._answers.popitem(last=False)
            self.size -= oldest.nbytes


_memories: WeakKeyDictionary[ModelPatcher, SourceMemory] = WeakKeyDictionary()


def memory_of(model: ModelPatcher) -> SourceMemory:
    """The memory of a model as it is on a wire: another LoRA makes another model of it.

    It goes when the model does.
    """
    return _memories.setdefault(model, SourceMemory())


def is_repeatable(options: dict[str, Any]) -> bool:
    """Whether a call with these `model_options` answers the same to the same question."""
    inner = options["transformer_options"]
    if values.sharing_key in inner or any(options.get(hook) for hook in hooks):
        return False
    wrappers = (options.get("wrappers", {}), inner.get("wrappers", {}))
    keys = (key for kinds in wrappers for kind in kinds.values() for key in kind)
    return all(str(key).startswith(_own) for key in keys)


def digest(things: Iterable[Any]) -> bytes:
    """A fingerprint of nested tensors, numbers and texts, by their content."""
    found = hashlib.blake2b(digest_size=16)
    _add(found, list(things))
    return found.digest()


def has_content(thing: Any) -> bool:
    """Whether a thing is made of what has a fingerprint; ControlNets and hooks are not."""
    if isinstance(thing, dict):
        return all(has_content(part) for pair in thing.items() for part in pair)
    if isinstance(thing, list | tuple):
        return all(map(has_content, thing))
    return torch.is_tensor(thing) or isinstance(thing, _plain)


def _add(found: Any, thing: Any) -> None:
    if torch.is_tensor(thing):
        found.update(f"tensor {thing.dtype} {tuple(thing.shape)}".encode())
        found.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(thing, dict):
        found.update(f"dict {len(thing)}".encode())
        for key in sorted(thing):
            _add(found, key)
            _add(found, thing[key])
    elif isinstance(thing, list | tuple):
        found.update(f"list {len(thing)}".encode())
        for part in thing:
            _add(found, part)
    else:
        assert isinstance(thing, _plain), "see `has_content`"
        found.update(f"{type(thing).__name__} {thing!r};".encode())
