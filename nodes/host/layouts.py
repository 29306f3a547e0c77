"""Where text and picture lie in each model family's attention: the table that the tap works by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from . import families

Kind = Literal["joint", "self", "cross"]


@dataclass(frozen=True)
class Block:
    """A transformer block, named as its model names it.

    Attributes:
        kind: "double", "single", "joint", "layer", or a UNet's "input", "middle", "output".
        index: within its kind.
        part: a UNet's block can hold several transformers.
    """

    kind: str
    index: int
    part: int = 0

    def __str__(self) -> str:
        part = f".{self.part}" if self.part else ""
        return f"{self.kind} {self.index}{part}"


@dataclass(frozen=True)
class Place:
    """What one attention call is about.

    Attributes:
        block: where it happens.
        kind: "joint" (text and picture attend to each other), "self" (picture only) or "cross"
            (picture to text).
        image: the picture's tokens among the queries; reference pictures are not in it.
        text: the prompt's tokens among the keys, or None in a self-attention.
        grid: frames, rows and columns of the picture's tokens.
    """

    block: Block
    kind: Kind
    image: slice
    text: slice | None
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """What an attention call shows of itself: lengths, options, and which of its block it is."""

    queries: int
    keys: int
    options: dict[str, Any]
    latent: tuple[int, ...]
    """Shape of the latents of the model call, (B, C, [T,] H, W)."""
    given: dict[str, Any]
    """What else the model is given, by ComfyUI's names."""
    turn: int
    """How many calls the same block made before in this model call."""


@dataclass(frozen=True)
class ValueSize:
    """How large the values of one block's self-attention or joint attention are.

    Attributes:
        tokens: of the picture.
        width: of all heads together.
        text: the prompt's tokens among them.
    """

    tokens: int
    width: int
    text: int


@dataclass(frozen=True)
class Layout:
    """One model family's attention.

    Attributes:
        blocks: its transformer blocks in the order in which they run.
        width: of all heads together, in the blocks of a transformer; None for UNets.
        place: what a call is about, or None if it is none of these blocks' attentions.
        text_padding: on which side the model lengthens a prompt's tokens.
        indexed: whether the model says itself which block runs.
    """

    blocks: Callable[[nn.Module], list[Block]]
    place: Callable[[nn.Module, Shape], Place | None]
    width: Callable[[nn.Module], int] | None
    text_padding: Literal["left", "right"] = "right"
    indexed: bool = True


def _grid(model: nn.Module, latent: tuple[int, ...]) -> tuple[int, int, int]:
    patch = model.patch_size
    frames, rows, columns = patch if isinstance(patch, tuple | list) else (1, patch, patch)
    count = latent[2] if len(latent) == 5 else 1
    return (
        math.ceil(count / frames),
        math.ceil(latent[-2] / rows),
        math.ceil(latent[-1] / columns),
    )


def _joint(model: nn.Module, shape: Shape) -> Place | None:
    """[text, picture, references], as in Flux, Chroma, Qwen-Image and SD3."""
    kind, index = shape.options.get("block_type"), shape.options.get("block_index")
    if kind is None or index is None:
        return None
    grid = _grid(model, shape.latent)
    tokens = math.prod(grid)
    block = Block(kind, index)
    if shape.queries == tokens:
        return Place(block, "self", slice(0, tokens), None, grid)
    references = sum(shape.options.get("reference_image_num_tokens", ()))
    text = shape.queries - tokens - references
    if text < 0 or shape.keys != shape.queries:
        return None
    return Place(block, "joint", slice(text, text + tokens), slice(0, text), grid)


def _padded(model: nn.Module, length: int) -> int:
    """Tokens with the padding that Z-Image puts behind a text or a picture."""
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    return math.ceil(length / multiple) * multiple


def _lumina(model: nn.Module, shape: Shape) -> Place | None:
    """[references' texts, text, (references,) picture, padding]; its refiners name no block."""
    if shape.options.get("block_type") is None:
        return None
    grid = _grid(model, shape.latent)
    tokens = math.prod(grid)
    start = shape.queries - _padded(model, tokens)
    references = len(shape.given.get("ref_latents", ()))
    texts = [text.shape[1] for text in shape.given.get("ref_contexts", ())][:references]
    # A reference without a text has one token of padding in its place, padded.
    first = sum(_padded(model, length) for length in texts + [1] * (references - len(texts)))
    text = slice(first, first + _padded(model, shape.given["c_crossattn"].shape[1]))
    if start < text.stop:
        return None
    block = Block("layer", shape.options["block_index"])
    return Place(block, "joint", slice(start, start + tokens), text, grid)


def _wan(model: nn.Module, shape: Shape) -> Place | None:
    """A self-attention over [references, picture, more], then a cross-attention to the text."""
    if shape.options.get("block_index") is None:
        return None
    grid = _grid(model, shape.latent)
    tokens = math.prod(grid)
    # References come last, but for those that have a convolution of their own.
    start = 0 if model.ref_conv is None else shape.queries - tokens
    if start < 0 or start + tokens > shape.queries:
        return None
    block, image = Block("layer", shape.options["block_index"]), slice(start, start + tokens)
    if shape.turn == 0:
        return Place(block, "self", image, None, grid)
    # Picture-to-video models attend to a picture's tokens before they attend to the text's.
    crossing = 2 if getattr(model.blocks[block.index].cross_attn, "k_img", None) else 1
    if shape.turn != crossing:
        return None
    return Place(block, "cross", image, slice(0, shape.keys), grid)


def _unet(_model: nn.Module, shape: Shape) -> Place | None:
    """A self-attention, then a cross-attention; other packs may take either over."""
    name, size = shape.options.get("block"), shape.options.get("activations_shape")
    if name is None or size is None:
        return None
    rows, columns = size[-2:]
    if shape.queries != rows * columns:
        return None
    block = Block(name[0], name[1], shape.options.get("block_index", 0))
    image, grid = slice(0, shape.queries), (1, rows, columns)
    if shape.keys == shape.queries and shape.turn == 0:
        return Place(block, "self", image, None, grid)
    return Place(block, "cross", image, slice(0, shape.keys), grid)


def _counted(**lists: str) -> Callable[[nn.Module], list[Block]]:
    """Blocks by the attributes that hold them, kind=attribute."""
    return lambda model: [
        Block(kind, index)
        for kind, attribute in lists.items()
        for index in range(len(getattr(model, attribute)))
    ]


def _unet_transformers(model: nn.Module) -> Iterator[tuple[Block, nn.Module]]:
    """A UNet's transformer blocks in the order in which they run."""
    middle = [] if model.middle_block is None else [model.middle_block]
    stages = (("input", model.input_blocks), ("middle", middle), ("output", model.output_blocks))
    for kind, blocks in stages:
        for index, stage in enumerate(blocks):
            for layer in stage:
                for part, block in enumerate(getattr(layer, "transformer_blocks", ())):
                    yield Block(kind, index, part), block


def _unet_blocks(model: nn.Module) -> list[Block]:
    return [block for block, _ in _unet_transformers(model)]


_flux_blocks = _counted(double="double_blocks", single="single_blocks")

LAYOUTS: dict[type, Layout] = {
    Flux: Layout(_flux_blocks, _joint, lambda m: m.hidden_size, text_padding="left"),
    Chroma: Layout(_flux_blocks, _joint, lambda m: m.hidden_size),
    MMDiT: Layout(
        _counted(joint="joint_blocks"),
        _joint,
        lambda m: m.joint_blocks[0].x_block.attn.qkv.in_features,
        indexed=False,
    ),
    QwenImageTransformer2DModel: Layout(
        _counted(double="transformer_blocks"), _joint, lambda m: m.inner_dim
    ),
    NextDiT: Layout(_counted(layer="layers"), _lumina, lambda m: m.dim),
    WanModel: Layout(_counted(layer="blocks"), _wan, lambda m: m.dim),
    UNetModel: Layout(_unet_blocks, _unet, None),
}
"""Diffusion model class -> how its attention lies. Subclasses go with their parents."""


def layout_of(model: ModelPatcher) -> Layout:
    """The layout of a model's attention.

    Raises:
        ValueError: a family that is not in the table.
    """
    network = model.model.diffusion_model
    for kind, layout in LAYOUTS.items():
        if isinstance(network, kind):
            return layout
    raise ValueError(
        f"model is {families.name(model)}, whose attention Pinpoint cannot read: load SD1.5, SDXL, "
        "SD3, SD3.5, Flux, Flux.2, Chroma, Qwen-Image, Z-Image, Lumina 2 or Wan"
    )


def blocks_of(model: ModelPatcher) -> list[Block]:
    """The transformer blocks of a model in the order in which they run."""
    return layout_of(model).blocks(model.model.diffusion_model)


def grid_of(model: ModelPatcher, latent: tuple[int, ...]) -> tuple[int, int, int]:
    """Frames, rows and columns of a transformer's tokens of a latent (B, C, [T,] H, W)."""
    return _grid(model.model.diffusion_model, latent)


def attention_widths(model: ModelPatcher) -> dict[Block, int]:
    """Width of all heads together where each block's picture attends to the text."""
    layout, network = layout_of(model), model.model.diffusion_model
    if layout.width is None:
        return {b: module.attn2.to_q.out_features for b, module in _unet_transformers(network)}
    return dict.fromkeys(layout.blocks(network), layout.width(network))


def text_keys(model: ModelPatcher) -> dict[Block, Tensor]:
    """The weights by which each block of a UNet makes keys of texts; none of transformers."""
    layout, network = layout_of(model), model.model.diffusion_model
    if layout.width is not None:
        return {}
    return {b: module.attn2.to_k.weight for b, module in _unet_transformers(network)}


def value_sizes(model: ModelPatcher, latent: tuple[int, ...], text: int) -> dict[Block, ValueSize]:
    """How many values each block has.

    Args:
        latent: its shape, (B, C, [T,] H, W).
        text: tokens of the prompt as the model is given them.
    """
    layout, network = layout_of(model), model.model.diffusion_model
    if layout.width is None:
        return _unet_sizes(network, latent)
    joined = 0 if layout.place is _wan else _padded(network, text)
    size = ValueSize(math.prod(_grid(network, latent)), layout.width(network), joined)
    return dict.fromkeys(layout.blocks(network), size)


def _unet_sizes(model: nn.Module, latent: tuple[int, ...]) -> dict[Block, ValueSize]:
    """The way down halves the grid at every Downsample; the way up has the same grids reversed."""
    rows, columns = latent[-2:]
    down = []
    for stage in model.input_blocks:
        if any(isinstance(layer, Downsample) for layer in stage):
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        down.append(rows * columns)
    tokens = {"input": down, "middle": down[-1:], "output": down[::-1]}
    return {
        block: ValueSize(tokens[block.kind][block.index], module.attn1.to_v.out_features, 0)
        for block, module in _unet_transformers(model)
    }


def chosen_blocks(model: ModelPatcher, choice: str) -> frozenset[Block]:
    """The blocks that a widget's text names.

    The text is a comma-separated list of kinds, ranges, or both: "all", "single", "single 20-37",
    "double 3", "0-18" (of every kind), "67%-100%" (of the whole depth) or "single 50%-100%".

    Raises:
        ValueError: a part that cannot be read, or that names no block of this model.
    """
    blocks = blocks_of(model)
    chosen: set[Block] = set()
    for part in filter(None, (part.strip() for part in choice.lower().split(","))):
        found = _named(blocks, part)
        if not found:
            raise ValueError(
                f"blocks has '{part}', which {families.name(model)} has not: its blocks are "
                f"{ranges(blocks)}; write for example all, 67%-100% or a kind with a range"
            )
        chosen |= found
    if not chosen:
        raise ValueError("blocks is empty: write for example all or 67%-100%")
    return frozenset(chosen)


def ranges(blocks: list[Block]) -> str:
    """Blocks in few words: "double 0-18, single 0-37"."""
    ranges: list[tuple[str, int, int]] = []
    for block in blocks:
        kind, first, last = ranges[-1] if ranges else ("", 0, 0)
        if kind == block.kind and block.index - last <= 1:
            ranges[-1] = (kind, first, block.index)
        else:
            ranges.append((block.kind, block.index, block.index))
    return ", ".join(f"{k} {a}" if a == b else f"{k} {a}-{b}" for k, a, b in ranges)


def _named(blocks: list[Block], part: str) -> set[Block]:
    *words, bounds = part.split()
    kinds = {block.kind for block in blocks}
    if not words and (bounds in kinds or bounds == "all"):
        return {block for block in blocks if bounds in ("all", block.kind)}
    if len(words) > 1 or not set(words) <= kinds:
        return set()
    candidates = [block for block in blocks if not words or block.kind == words[0]]
    first, _, last = bounds.partition("-")
    try:
        if first.endswith("%") and last.endswith("%"):
            low, high = float(first[:-1]) / 100, float(last[:-1]) / 100
            count = len(candidates)
            # A block is in when it begins in the range, so that ranges that meet share no block.
            # A tenth of a block is forgiven: 67% then is two thirds of 6 blocks as well as of 57.
            return {b for i, b in enumerate(candidates) if low <= (i + 0.1) / count < high}
        low, high = int(first), int(last or first)
    except ValueError:
        return set()
    return {block for block in candidates if low <= block.index <= high}
