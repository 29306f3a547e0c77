"""FlexIP adapters as safetensors files in models/flexip.

Tensors are those of `kernels.flexip.FlexIP`; the metadata holds the model family, the sizes, how
the gate acts and how the adapter was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ...kernels.flexip import FlexIP, FlexIPSizes, Mode
from . import tensor_files
from .adapters import (
    Adapter,
    FlexIPPersonalization,
    FlexIPPreservation,
    block_key,
    patcher,
)
from .layouts import Block
from .subjects import EncoderKind, EncoderKinds

folder = "flexip"
state_suffix = f".state{tensor_files.suffix}"
"""Of what the training of an adapter goes on from."""
_format, _version = "pinpoint_flexip", 1
_largest_size, _deepest, _most_blocks = 2**16, 64, 1024


def names() -> list[str]:
    """The adapters in models/flexip, with their folders."""
    return [name for name in tensor_files.names(folder) if not name.endswith(state_suffix)]


def load(file_name: str) -> Adapter:
    """Read an adapter.

    Args:
        file_name: one of `names`.

    Raises:
        ValueError: the file is not there, not whole, no adapter, or one of a newer Pinpoint.
    """
    return load_file(tensor_files.path_of(folder, file_name))


def load_file(path: Path) -> Adapter:
    """Read an adapter from anywhere; see `load`."""
    tensors, metadata = tensor_files.read(path)
    file_name = path.name
    if metadata.get("format") != _format:
        raise ValueError(
            f"file {file_name} is no FlexIP adapter: load IP-Adapter files with IP-Adapter as "
            "Branches, and others with their own nodes"
        )
    if metadata.get("format_version") != str(_version):
        raise ValueError(
            f"file {file_name} has format {metadata.get('format_version')}, this Pinpoint knows "
            f"{_version}: update Pinpoint"
        )
    family = metadata.get("family")
    if not family:
        raise ValueError(
            f"file {file_name} is damaged: it does not say its model family; download or save it "
            "again"
        )
    sizes, blocks = _sizes(metadata, file_name)
    network = tensor_files.filled(lambda operations: FlexIP(sizes, operations), tensors, file_name)
    mode, encoders = _mode(metadata, file_name), _encoders(metadata, file_name)
    return Adapter(
        name=file_name.removesuffix(tensor_files.suffix),
        family=family,
        patcher=patcher(network),
        preservation=FlexIPPreservation(network),
        personalization=FlexIPPersonalization(network),
        blocks={block: sizes.blocks[block_key(block)] for block in blocks},
        text_width=sizes.text_width,
        mode=mode,
        about=_about(metadata, sizes, mode, encoders),
        encoders=encoders,
    )


def content(
    network: FlexIP,
    blocks: list[Block],
    family: str,
    mode: Mode,
    recipe: Mapping[str, str],
    encoders: EncoderKinds | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors in fp16, and its metadata.

    Args:
        recipe: how it was trained.
        encoders: with which image encoders.
    """
    tensors = {key: t.detach().to("cpu", torch.float16) for key, t in network.state_dict().items()}
    sizes = {key: value for key, value in asdict(network.sizes).items() if key != "blocks"}
    widths = network.sizes.blocks
    listed = [[b.kind, b.index, b.part, widths[block_key(b)]] for b in blocks]
    metadata = {
        "format": _format,
        "format_version": str(_version),
        "family": family,
        "mode": mode,
        "sizes": json.dumps(sizes),
        "blocks": json.dumps(listed),
        "recipe": json.dumps(dict(recipe)),
        "encoders": json.dumps(encoders),
    }
    return tensors, metadata


def _sizes(metadata: dict[str, str], file_name: str) -> tuple[FlexIPSizes, list[Block]]:
    names = [field.name for field in fields(FlexIPSizes) if field.name != "blocks"]
    try:
        given = json.loads(metadata["sizes"])
        numbers = {name: _size(given[name], name) for name in names}
        if numbers["width"] % numbers["head_width"]:
            raise ValueError("width is no multiple of head_width")
        listed = json.loads(metadata["blocks"])
        if len(listed) > _most_blocks:
            raise ValueError(f"{len(listed)} blocks")
        blocks = [_block(*place) for *place, _ in listed]
        if len(set(blocks)) != len(blocks):
            raise ValueError("blocks are listed twice")
        widths = {block_key(b): _size(row[3], "") for b, row in zip(blocks, listed, strict=True)}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"file {file_name} is damaged: its sizes cannot be read ({error}); download or save it "
            "again"
        ) from error
    return FlexIPSizes(**numbers, blocks=widths), blocks


def _block(kind: str, index: int, part: int) -> Block:
    is_named = isinstance(kind, str) and kind.isalpha()
    if not is_named or type(index) is not int or type(part) is not int:
        raise ValueError(f"block {kind} {index} {part}")
    return Block(kind, index, part)


def _mode(metadata: dict[str, str], file_name: str) -> Mode:
    found = metadata.get("mode")
    for mode in get_args(Mode):
        if found == mode:
            return mode
    raise ValueError(
        f"file {file_name} is damaged: its gate is {found}, which is not one of "
        f"{', '.join(get_args(Mode))}; download or save it again"
    )


def _encoders(metadata: dict[str, str], file_name: str) -> EncoderKinds | None:
    try:
        listed = json.loads(metadata.get("encoders", "null"))
        if listed is None:
            return None
        low, high = (EncoderKind(str(row[0]), *map(int, row[1:])) for row in listed)
    except (TypeError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"file {file_name} is damaged: its image encoders cannot be read ({error}); download "
            "or save it again"
        ) from error
    return low, high


def _size(value: Any, name: str) -> int:
    largest = _deepest if name.endswith("depth") else _largest_size
    if not isinstance(value, int) or not 0 < value <= largest:
        raise ValueError(f"{name} is {value}")
    return value


def _about(
    metadata: dict[str, str], sizes: FlexIPSizes, mode: Mode, encoders: EncoderKinds | None
) -> str:
    lines = [
        f"FlexIP adapter for {metadata.get('family')}, trained with the {mode} gate",
        f"reads image encoders {sizes.low_width} (low) and {sizes.high_width} (high) wide, text "
        f"{sizes.text_width} wide",
        f"{sizes.detail_tokens} detail and {sizes.global_tokens} global tokens for each reference",
    ]
    if encoders is not None:
        lines += [f"low_encoder: {encoders[0]}", f"high_encoder: {encoders[1]}"]
    return "\n".join(lines)
