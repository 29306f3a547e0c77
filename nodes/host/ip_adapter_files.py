"""Public IP-Adapter files as the two branches of an adapter.

A file holds an image projection, `image_proj.…`, and for each cross-attention of a UNet
`ip_adapter.<number>.to_k_ip.weight` and `to_v_ip.weight`. The numbers count the attentions as the
`diffusers` package lists them, self and cross in turn: of the way down, of the way up, of the
middle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from torch import nn

from ...kernels.ip_adapter import (
    FullProjection,
    ImageProjection,
    IPAdapterBranch,
    Projection,
    Resampler,
    head_width,
)
from . import tensor_files
from .adapters import Adapter, IPAdapterTokens, patcher
from .layouts import Block

folder = "ipadapter"
"""Below models; the folder of the packs that brought IP-Adapters to ComfyUI."""

_key = re.compile(r"image_proj\.[\w.]+|ip_adapter\.(\d{1,3})\.to_[kv]_ip\.weight")
_resampler_layer = re.compile(r"image_proj\.layers\.(\d{1,2})\.")
_of_face_id = ("perceiver_resampler.", "_lora.")
_of_transformers = ("double_blocks.", "single_blocks.", "ip_adapter_proj_model.", "norm_ip")


@dataclass(frozen=True)
class Family:
    """A model family that IP-Adapters were trained for.

    Attributes:
        width: of its prompts' tokens, and so of the picture's.
        blocks: those with a cross-attention, in the order in which files number them.
    """

    width: int
    blocks: tuple[Block, ...]

    @property
    def numbers(self) -> dict[Block, str]:
        """What each block's cross-attention is called in a file; self-attentions are counted."""
        return {block: str(2 * place + 1) for place, block in enumerate(self.blocks)}


def _blocks(**depths: Mapping[int, int]) -> tuple[Block, ...]:
    """Of each kind: index -> how many transformers there are."""
    return tuple(
        Block(kind, index, part)
        for kind, of_kind in depths.items()
        for index, depth in of_kind.items()
        for part in range(depth)
    )


FAMILIES = {
    "SD15": Family(
        768,
        _blocks(
            input=dict.fromkeys((1, 2, 4, 5, 7, 8), 1),
            output=dict.fromkeys(range(3, 12), 1),
            middle={0: 1},
        ),
    ),
    "SDXL": Family(
        2048,
        _blocks(
            input={4: 2, 5: 2, 7: 10, 8: 10},
            output={0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2},
            middle={0: 10},
        ),
    ),
}


def register_folder() -> None:
    """Make models/ipadapter known to ComfyUI, unless another pack or a setting has done it."""
    path = Path(folder_paths.models_dir) / folder
    # While it is missing, another pack may still come and register a folder of its own.
    if folder not in folder_paths.folder_names_and_paths and path.is_dir():
        tensor_files.register_folder(folder)


def names() -> list[str]:
    """The safetensors files of models/ipadapter, with their folders."""
    register_folder()
    if folder not in folder_paths.folder_names_and_paths:
        return []
    return tensor_files.names(folder)


def load(preservation: str, personalization: str) -> Adapter:
    """Read two files as the branches of an adapter; one file can be both.

    Args:
        preservation, personalization: of `names`.

    Raises:
        ValueError: a file is not there, not whole or no IP-Adapter that reads CLIP's view of a
            picture for SD1.5 or SDXL; or the two are for different models.
    """
    kept = _load("preservation", preservation)
    free = kept
    if personalization != preservation:
        free = _load("personalization", personalization)
    if kept.family != free.family:
        raise ValueError(
            f"preservation is {preservation}, for {kept.family}, and personalization is "
            f"{personalization}, for {free.family}: choose two files for the same family"
        )
    if kept.widths != free.widths:
        raise ValueError(
            f"preservation is {preservation}, and personalization is {personalization}, made for "
            f"another size of {kept.family}: choose two files for the same model"
        )
    lines = [
        f"IP-Adapters for {kept.family}",
        f"preservation: {kept.about}",
        f"personalization: {free.about}",
    ]
    return Adapter(
        name=" and ".join(dict.fromkeys((kept.name, free.name))),
        family=kept.family,
        patcher=patcher(nn.ModuleList(dict.fromkeys((kept.branch.network, free.branch.network)))),
        preservation=kept.branch,
        personalization=free.branch,
        blocks=kept.widths,
        text_width=None,
        mode="linear",
        about="\n".join(lines),
    )


@dataclass(frozen=True)
class _File:
    """A file that was read."""

    name: str
    family: str
    branch: IPAdapterTokens
    widths: dict[Block, int]
    about: str


def _load(role: str, file_name: str) -> _File:
    tensors, _ = tensor_files.read(tensor_files.path_of(folder, file_name, role))
    content = _Content(role, file_name, {key: tuple(t.shape) for key, t in tensors.items()})
    content.require_known()
    projection = _projection(content)
    family = content.family(projection.width)
    numbers = FAMILIES[family].numbers
    inner = {n: content.shape(f"ip_adapter.{n}.to_k_ip.weight", 2)[0] for n in numbers.values()}

    def build(operations: Any) -> IPAdapterBranch:
        return IPAdapterBranch(projection.build(operations), inner, projection.width, operations)

    network = tensor_files.filled(build, tensors, file_name)
    name = file_name.removesuffix(tensor_files.suffix)
    return _File(
        name=name,
        family=family,
        branch=IPAdapterTokens(network, numbers, projection.image_width),
        widths={block: inner[number] for block, number in numbers.items()},
        about=f"{name}, {projection.about}",
    )


@dataclass(frozen=True)
class _Content:
    """The names and shapes of a file's tensors.

    Attributes:
        role: the input that the file was chosen for.
    """

    role: str
    file_name: str
    shapes: Mapping[str, tuple[int, ...]]

    def refusal(self, what: str) -> ValueError:
        """An error that says what is wrong."""
        return ValueError(
            f"{self.role} is {self.file_name}, {what}: choose a global, plus or full-face "
            "IP-Adapter for SD1.5 or SDXL, or download it again"
        )

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            ValueError: it is missing, empty or has other dimensions.
        """
        shape = self.shapes.get(key, ())
        if len(shape) != dimensions or not all(shape):
            found = list(shape) if key in self.shapes else "missing"
            raise self.refusal(f"which is damaged: {key} is {found}")
        return shape

    def require_known(self) -> None:
        """Refuse other files by the names of their tensors."""
        numbers = self._numbers()
        if self._has(*_of_transformers) or any(int(number) % 2 == 0 for number in numbers):
            raise self.refusal("an IP-Adapter for a transformer such as Flux or SD3")
        # Projections of both kinds begin alike; full-face ones have a norm at the end.
        begins, ends = (self._has(f"image_proj.proj.{place}.") for place in (0, 3))
        if self._has(*_of_face_id) or (begins and not ends):
            raise self.refusal("a FaceID adapter, which reads faces with InsightFace, not CLIP")
        for key in self.shapes:
            if not _key.fullmatch(key):
                raise self.refusal(f"which holds {key}, so it is no IP-Adapter")

    def family(self, width: int) -> str:
        """The family whose attentions the file has, for tokens of a width."""
        found = self._numbers()
        for name, family in FAMILIES.items():
            if family.width == width and found == {*family.numbers.values()}:
                return name
        known = " and ".join(
            f"{len(family.blocks)} for tokens of width {family.width} ({name})"
            for name, family in FAMILIES.items()
        )
        raise self.refusal(
            f"which has {len(found)} attentions for tokens of width {width}, where Pinpoint knows "
            f"{known}"
        )

    def _numbers(self) -> set[str]:
        return {m[1] for key in self.shapes if (m := _key.fullmatch(key)) and m[1]}

    def _has(self, *parts: str) -> bool:
        return any(part in key for key in self.shapes for part in parts)


@dataclass(frozen=True)
class _Projection:
    """What a file's image projection is made of.

    Attributes:
        image_width: of what it reads.
        width: of its tokens.
        about: in words.
    """

    image_width: int
    width: int
    build: Callable[[Any], Projection]
    about: str


def _projection(content: _Content) -> _Projection:
    if "image_proj.latents" in content.shapes:
        return _resampler(content)
    if "image_proj.proj.3.weight" in content.shapes:
        inner, image_width = content.shape("image_proj.proj.0.weight", 2)
        (width,) = content.shape("image_proj.proj.3.weight", 1)
        return _Projection(
            image_width,
            width,
            lambda operations: FullProjection(image_width, inner, width, operations),
            f"full: a token for each hidden state of width {image_width}",
        )
    (width,) = content.shape("image_proj.norm.weight", 1)
    rows, image_width = content.shape("image_proj.proj.weight", 2)
    if rows % width:
        raise content.refusal(
            f"which is damaged: its projection has {rows} rows for tokens of width {width}"
        )
    tokens = rows // width
    return _Projection(
        image_width,
        width,
        lambda operations: ImageProjection(image_width, width, tokens, operations),
        f"global: {tokens} tokens from an embedding of width {image_width}",
    )


def _resampler(content: _Content) -> _Projection:
    _, tokens, inner = content.shape("image_proj.latents", 3)
    _, image_width = content.shape("image_proj.proj_in.weight", 2)
    width, _ = content.shape("image_proj.proj_out.weight", 2)
    attention_width, _ = content.shape("image_proj.layers.0.0.to_q.weight", 2)
    mlp_width, _ = content.shape("image_proj.layers.0.1.1.weight", 2)
    depth = len({m[1] for key in content.shapes if (m := _resampler_layer.match(key))})
    if attention_width % head_width:
        raise content.refusal(
            f"whose attention is {attention_width} wide, which is no multiple of {head_width}"
        )

    def build(operations: Any) -> Resampler:
        return Resampler(
            image_width, inner, width, tokens, attention_width, mlp_width, depth, operations
        )

    about = f"plus: {tokens} tokens from hidden states of width {image_width}"
    return _Projection(image_width, width, build, about)
