"""Public IP-Adapter files: their names and shapes, small ones with the same keys, and subjects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from . import subjects

Shape = tuple[int, ...]

WIDTHS = {
    "SD15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    "SDXL": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}
"""Of each cross-attention: the way down, the way up, the middle."""
TEXT = {"SD15": 768, "SDXL": 2048}
PUBLIC = {
    "ip-adapter_sd15": ("SD15", "global", 1024),
    "ip-adapter_sd15_light": ("SD15", "global", 1024),
    "ip-adapter_sd15_vit-G": ("SD15", "global", 1280),
    "ip-adapter-plus_sd15": ("SD15", "plus", 1280),
    "ip-adapter-plus-face_sd15": ("SD15", "plus", 1280),
    "ip-adapter-full-face_sd15": ("SD15", "full", 1280),
    "ip-adapter_sdxl": ("SDXL", "global", 1280),
    "ip-adapter_sdxl_vit-h": ("SDXL", "global", 1024),
    "ip-adapter-plus_sdxl_vit-h": ("SDXL", "plus", 1280),
    "ip-adapter-plus-face_sdxl_vit-h": ("SDXL", "plus", 1280),
}
"""Name -> model family, kind, and width of what it reads of the image encoder."""

HIGH, HIDDEN, STATES = 24, 40, 9
"""Widths of the small encoder's embedding and states, and how many states it has."""


def public_shapes(name: str) -> dict[str, Shape]:
    """The tensors of a public file."""
    family, kind, image_width = PUBLIC[name]
    # Resamplers are as wide as SD1.5's text, but for SDXL, where they have a width of their own.
    inner = {"SD15": 768, "SDXL": 1280}[family]
    return shapes(kind, WIDTHS[family], TEXT[family], image_width, inner)


def shapes(
    kind: str, widths: list[int], width: int, image_width: int, inner: int
) -> dict[str, Shape]:
    """The tensors of a file.

    Args:
        kind: "global", "plus" or "full".
        widths: of the attentions.
        width: of the tokens.
        image_width: of what it reads.
        inner: of a Resampler's tokens and attention.
    """
    projection = {
        "global": lambda: _global(image_width, width),
        "plus": lambda: _plus(image_width, width, inner),
        "full": lambda: _full(image_width, width),
    }[kind]()
    layers = {
        f"ip_adapter.{2 * place + 1}.to_{part}_ip.weight": (attention, width)
        for place, attention in enumerate(widths)
        for part in "kv"
    }
    return {f"image_proj.{key}": shape for key, shape in projection} | layers


def _both(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _global(image_width: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _both("proj", 4 * width, image_width)
    yield from _both("norm", width)


def _full(image_width: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _both("proj.0", image_width, image_width)
    yield from _both("proj.2", width, image_width)
    yield from _both("proj.3", width)


def _plus(image_width: int, width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield "latents", (1, 16, inner)
    yield from _both("proj_in", inner, image_width)
    yield from _both("proj_out", width, inner)
    yield from _both("norm_out", width)
    for layer in range(4):
        attention, mlp = f"layers.{layer}.0", f"layers.{layer}.1"
        yield from _both(f"{attention}.norm1", inner)
        yield from _both(f"{attention}.norm2", inner)
        yield f"{attention}.to_q.weight", (inner, inner)
        yield f"{attention}.to_kv.weight", (2 * inner, inner)
        yield f"{attention}.to_out.weight", (inner, inner)
        yield from _both(f"{mlp}.0", inner)
        yield f"{mlp}.1.weight", (4 * inner, inner)
        yield f"{mlp}.3.weight", (inner, 4 * inner)


def weights(
    kind: str, family: str = "SD15", *, width: int = 768, seed: int = 0
) -> dict[str, Tensor]:
    """Drawn weights of a file for the whole tiny model of a family, a tenth as wide as in truth."""
    widths = [attention // 10 for attention in WIDTHS[family]]
    image_width = HIGH if kind == "global" else HIDDEN
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for key, shape in shapes(kind, widths, width, image_width, 128).items()
    }


def folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a test's folder be the one for IP-Adapters, as another pack registers it."""
    import folder_paths

    entry = ([str(path)], {".safetensors", ".bin"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", entry)
    monkeypatch.delitem(folder_paths.filename_list_cache, "ipadapter", raising=False)
    return path


def write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write a file, and return its name."""
    save_file(dict(tensors), folder / f"{name}.safetensors")
    return f"{name}.safetensors"


def subject(pack: ModuleType, references: int = 1) -> Any:
    """A subject as the small encoder would see it."""
    return subjects.subject(pack, references, low=(5, 12), high=HIGH, hidden=(STATES, HIDDEN))
