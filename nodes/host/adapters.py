"""Adapters that bring a subject into a model's attention: what they are, and how they are applied.

Each adapter has two branches, as FlexIP's: one that preserves the subject and one that adapts it. A
branch turns a subject (and the prompt) into tokens, and tokens into a block's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import comfy.model_management
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from torch import Tensor, nn

from ...kernels.flexip import FlexIP, Gated, Mode
from ...kernels.ip_adapter import ImageProjection, IPAdapterBranch
from . import families, layouts
from .layouts import Block
from .subjects import EncoderKinds, Subject


class Branch(Protocol):
    """One branch of an adapter."""

    def require_fitting(self, subject: Subject) -> None:
        """Refuse a subject from other image encoders than the branch was trained with."""

    def tokens(self, subject: Subject, text: Tensor, seen: bool) -> Tensor:
        """(1, T, width), or a row for each of the text's.

        Args:
            text: (B, L, text width), as the model is given it.
            seen: whether the subject is there; a negative prompt's is not.
        """

    def keys_values(self, block: Block, tokens: Tensor) -> Gated:
        """Of a block's attention, (B, T, its width) each, of tokens (B, T, width)."""


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter.

    Attributes:
        name: of its file.
        family: of the models it was trained for, as `families.name` has it; None for several.
        patcher: of all its weights.
        preservation, personalization: its branches.
        blocks: of the model, and the width of their attention.
        text_width: of the prompts it reads, or None if it reads none.
        mode: how it was trained to be gated.
        about: what is known of it, a line each.
        encoders: that it was trained with; None if not known.
    """

    name: str
    family: str | None
    patcher: CoreModelPatcher
    preservation: Branch
    personalization: Branch
    blocks: dict[Block, int]
    text_width: int | None
    mode: Mode
    about: str
    encoders: EncoderKinds | None = None

    @property
    def branches(self) -> tuple[Branch, Branch]:
        """In the order of a gate's gains."""
        return self.preservation, self.personalization


def patcher(network: nn.Module) -> CoreModelPatcher:
    """What loads a network together with a model; to be kept as long as the network."""
    return CoreModelPatcher(
        network,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def block_key(block: Block) -> str:
    """A block's name as a part of a tensor's name: "joint_0", "input_4_1"."""
    part = f"_{block.part}" if block.part else ""
    return f"{block.kind}_{block.index}{part}"


@dataclass(frozen=True)
class FlexIPPreservation:
    """Detail and global tokens of every reference."""

    network: FlexIP

    def require_fitting(self, subject: Subject) -> None:
        """See `Branch`."""
        sizes = self.network.sizes
        _require_width("low_encoder", subject.low.shape[-1], sizes.low_width)
        _require_width(subject.high_input, subject.high.shape[-1], sizes.high_width)

    def tokens(self, subject: Subject, text: Tensor, seen: bool) -> Tensor:
        """See `Branch`; trained without a subject, the network knows one of zeros."""
        low, high = (_present(t, seen).to(text) for t in (subject.low, subject.high))
        return self.network.preservation(low, high).flatten(0, 1)[None]

    def keys_values(self, block: Block, tokens: Tensor) -> Gated:
        """See `Branch`."""
        return self.network.keys_values(block_key(block), tokens)


@dataclass(frozen=True)
class FlexIPPersonalization:
    """The prompt, resampled against all references."""

    network: FlexIP

    def require_fitting(self, subject: Subject) -> None:
        """See `Branch`."""
        _require_width(subject.high_input, subject.high.shape[-1], self.network.sizes.high_width)

    def tokens(self, subject: Subject, text: Tensor, seen: bool) -> Tensor:
        """See `Branch`."""
        high = _present(subject.high, seen).to(text)
        return self.network.personalization(text, high[None].expand(len(text), -1, -1))

    def keys_values(self, block: Block, tokens: Tensor) -> Gated:
        """See `Branch`."""
        return self.network.keys_values(block_key(block), tokens)


@dataclass(frozen=True)
class IPAdapterTokens:
    """A public IP-Adapter's tokens as a branch; it reads no text."""

    network: IPAdapterBranch
    numbers: dict[Block, str]
    image_width: int

    def require_fitting(self, subject: Subject) -> None:
        """See `Branch`."""
        kind = subject.encoders[1] if subject.encoders else None
        # The class token of a large DINOv2 is as wide as the embedding of CLIP ViT-H.
        if kind is not None and kind.model_type != "clip_vision_model":
            raise ValueError(
                f"subject comes from a {subject.high_input} that is {kind}, IP-Adapter files were "
                "trained with CLIP: connect the CLIP that the file's page names to Encode Subject"
            )
        found = subject.high if self._is_global else subject.hidden
        _require_width(subject.high_input, found.shape[-1], self.image_width)

    def tokens(self, subject: Subject, text: Tensor, seen: bool) -> Tensor:
        """See `Branch`; the files were trained without a picture as one of zeros."""
        hidden = subject.hidden if seen else subject.blank.expand_as(subject.hidden)
        high = _present(subject.high, seen)
        return self.network.tokens(high.to(text), hidden.to(text)).flatten(0, 1)[None]

    def keys_values(self, block: Block, tokens: Tensor) -> Gated:
        """See `Branch`."""
        return self.network.keys_values(self.numbers[block], tokens)

    @property
    def _is_global(self) -> bool:
        return isinstance(self.network.image_proj, ImageProjection)


def _present(features: Tensor, seen: bool) -> Tensor:
    return features if seen else torch.zeros_like(features)


def _require_width(encoder: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"subject comes from a {encoder} whose features are {found} wide, the adapter was "
            f"trained with {wanted}: connect the encoder it was trained with to Encode Subject"
        )


def require_fitting(model: ModelPatcher, adapter: Adapter, subject: Subject) -> None:
    """Refuse an adapter of another model family, or a subject of other image encoders."""
    family, blocks = families.name(model), layouts.attention_widths(model)
    if adapter.family is not None and families.base(adapter.family) != families.base(family):
        raise ValueError(
            f"adapter {adapter.name} was trained for {adapter.family}, the model is {family}: load "
            "the model or the adapter that belongs to the other"
        )
    strange = [b for b, width in adapter.blocks.items() if blocks.get(b) != width]
    if strange:
        found = blocks.get(strange[0])
        has = "which the model has not" if found is None else f"where the model's is {found}"
        raise ValueError(
            f"adapter {adapter.name} has attention for block {strange[0]} of width "
            f"{adapter.blocks[strange[0]]}, {has}: load the model that it was trained for"
        )
    _require_same_encoders(adapter.encoders, subject)
    for branch in adapter.branches:
        branch.require_fitting(subject)


def _require_same_encoders(wanted: EncoderKinds | None, subject: Subject) -> None:
    if wanted is None or subject.encoders is None:
        return
    names = "low_encoder", subject.high_input
    for name, own, other in zip(names, wanted, subject.encoders, strict=True):
        if own != other:
            raise ValueError(
                f"subject comes from a {name} that is {other}, the adapter was trained with {own}: "
                "connect that one to Encode Subject"
            )
