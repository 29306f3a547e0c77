"""Gradient checkpointing: blocks are computed twice, so that not all of them need be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import PatcherInjection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import tap

_lists = (
    "joint_blocks",
    "double_blocks",
    "single_blocks",
    "transformer_blocks",
    "layers",
    "blocks",
)
"""Names of the lists in which transformers have their blocks."""


def checkpointed(blocks: Iterable[nn.Module]) -> PatcherInjection:
    """An injection by which blocks of a network of one's own forget what they computed.

    ComfyUI has no hook around a block of every family. The network is a private copy, so nobody
    else sees that its blocks' `forward` is replaced while it is loaded.
    """
    blocks = list(blocks)
    originals = [block.forward for block in blocks]

    def inject(_patcher: Any) -> None:
        for block, forward in zip(blocks, originals, strict=True):
            block.forward = _forgetting(forward)

    def eject(_patcher: Any) -> None:
        for block in blocks:
            # The class's own forward is seen again.
            vars(block).pop("forward", None)

    return PatcherInjection(inject=inject, eject=eject)


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a diffusion model."""
    lists = [getattr(network, name, None) for name in _lists]
    found = [block for blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]
    if found:
        yield from found
        return
    for module in network.modules():
        if isinstance(module, BasicTransformerBlock | ResBlock):
            yield module


def layers_of(encoder: nn.Module) -> Iterator[nn.Module]:
    """The layers of text encoders, of which each kind has its list under another name."""
    for child in encoder.children():
        yield from child if isinstance(child, nn.ModuleList) else layers_of(child)


def _forgetting(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # Until then, the model lets its options name other blocks and sizes.
        later = tap.as_now(kwargs.get("transformer_options") or {})
        names = [name for name, value in kwargs.items() if torch.is_tensor(value)]
        places = [place for place, value in enumerate(args) if torch.is_tensor(value)]

        def again(*tensors: Tensor) -> Any:
            # Blocks add to their inputs in place, which are needed unchanged the second time.
            copies = iter([t.clone() for t in tensors])
            positional = list(args)
            for place in places:
                positional[place] = next(copies)
            named = {**kwargs, **{name: next(copies) for name in names}}
            # The first time, no gradients are recorded.
            if torch.is_grad_enabled() and "transformer_options" in named:
                named["transformer_options"] = tap.as_now(later)
            return forward(*positional, **named)

        tensors = [*(args[place] for place in places), *(kwargs[name] for name in names)]
        if not any(t.requires_grad for t in tensors):
            return forward(*args, **kwargs)
        return checkpoint(again, *tensors, use_reentrant=True, preserve_rng_state=False)

    return run
