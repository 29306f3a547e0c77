"""Random FlexIP adapters and subjects for the tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .tapping import Family

LOW, HIGH, HIDDEN = 24, 20, 28
"""Widths of what the image encoders give."""
ENCODERS = ("dinov2", LOW, 42, 14), ("clip_vision_model", HIGH, 28, 14)
"""What they are, as `EncoderKind`s."""
SIZES = dict(
    width=32, head_width=16, detail_tokens=5, global_tokens=3, detail_depth=2, text_depth=1
)


def subject(
    pack: ModuleType,
    references: int = 1,
    seed: int = 0,
    *,
    low: tuple[int, int] = (9, LOW),
    high: int = HIGH,
    hidden: tuple[int, int] = (10, HIDDEN),
) -> Any:
    """A Subject of noise, of these sizes."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return pack.nodes.host.subjects.Subject(
        low=drawn(references, *low),
        high=drawn(references, high),
        hidden=drawn(references, *hidden),
        blank=drawn(1, *hidden),
        encoders=kinds(pack),
    )


def kinds(pack: ModuleType) -> tuple[Any, Any]:
    """The image encoders that adapters and subjects here claim to be of."""
    low, high = (pack.nodes.host.subjects.EncoderKind(*sizes) for sizes in ENCODERS)
    return low, high


def adapter(pack: ModuleType, model: Any, family: Family, **changes: Any) -> Any:
    """An Adapter for a tiny model that changes much; `changes` are of its attributes."""
    kernel, host = pack.kernels.flexip, pack.nodes.host
    blocks = host.layouts.attention_widths(model)
    widths = {host.adapters.block_key(block): width for block, width in blocks.items()}
    sizes = kernel.FlexIPSizes(LOW, HIGH, family.text_width, blocks=widths, **SIZES)
    torch.manual_seed(5)
    drawn = kernel.FlexIP(sizes).requires_grad_(False)
    for layer in drawn.to_v.values():
        nn.init.normal_(layer.weight, std=0.3)
    network = host.tensor_files.filled(
        lambda operations: kernel.FlexIP(sizes, operations), drawn.state_dict(), "tiny"
    )
    made = host.adapters.Adapter(
        name="tiny",
        family=host.families.name(model),
        patcher=host.adapters.patcher(network),
        preservation=host.adapters.FlexIPPreservation(network),
        personalization=host.adapters.FlexIPPersonalization(network),
        blocks=blocks,
        text_width=family.text_width,
        mode="literal",
        about="",
        encoders=kinds(pack),
    )
    return replace(made, **changes)


def save(pack: ModuleType, adapter: Any, path: Path) -> Path:
    """Write one of these adapters, as Train FlexIP writes its own."""
    files = pack.nodes.host.adapter_files
    tensors, metadata = files.content(
        adapter.patcher.model,
        list(adapter.blocks),
        adapter.family,
        adapter.mode,
        {},
        adapter.encoders,
    )
    save_file(tensors, path, metadata)
    return path


def settings(pack: ModuleType, gamma: float = 0.6, **given: Any) -> Any:
    """Settings of Apply FlexIP Adapter, a constant gamma among them."""
    host = pack.nodes.host
    given = {"weight": 1.0, "gate": host.gates.constant(gamma), "mode": "literal", **given}
    return host.adapting.Settings(**given)


class Case:
    """A tiny model with an adapter and a subject."""

    def __init__(self, pack: ModuleType, model: Any, family: Family, references: int = 1):
        self.pack, self.model, self.family = pack, model, family
        self.adapter = adapter(pack, model, family)
        self.subject = subject(pack, references)

    def applied(self, model: Any = None, subject: Any = None, **given: Any) -> Any:
        """The model, or another of its kind, with the adapter; the rest are `settings`."""
        chosen = settings(self.pack, **given)
        return self.pack.nodes.host.adapting.applied(
            model or self.model, self.adapter, subject or self.subject, chosen
        )

    def without_subject(self) -> Any:
        """The subject as negative prompts have it."""
        return replace(
            self.subject,
            low=torch.zeros_like(self.subject.low),
            high=torch.zeros_like(self.subject.high),
        )

    def gate(self, *groups: tuple[str, float]) -> Any:
        """A gate of constant gammas for groups of blocks."""
        gates = self.pack.nodes.host.gates
        made = gates.Gate()
        for blocks, gamma in groups:
            made = made.extended(blocks, gates.Schedule("constant", gamma))
        return made
