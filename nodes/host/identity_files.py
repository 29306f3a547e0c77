"""Identities as files: one safetensors file each in models/identities, written whole or not at all.

Tensors are `vectors.<key of CLIP.tokenize>` and the LoRA's, by their names; all else is metadata.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import tensor_files
from .identity import Identity, require_name

folder = "identities"
"""Below models."""
_format, _version = "pinpoint_identity", 1
_parts = ("lora_up.weight", "lora_down.weight", "alpha")
_lora_key = re.compile(rf"(diffusion_model\.[\w.]+)\.({'|'.join(map(re.escape, _parts))})")
_embedding_keys = {"l": "clip_l", "g": "clip_g", "h": "clip_h"}
"""Where ComfyUI calls vectors otherwise than their tokens."""


def names() -> list[str]:
    """The files of models/identities, with their folders."""
    return tensor_files.names(folder)


def require_file_name(file_name: str) -> None:
    """Refuse a name that `save` could not use, as far as that is known without the identity.

    Raises:
        ValueError: it leads elsewhere, or is too long.
    """
    tensor_files.place_of(folder, _stem(file_name) or "name")


def save(
    identity: Identity,
    file_name: str,
    *,
    embedding: bool = False,
    lora: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write an identity, and on request its parts for ComfyUI's own nodes.

    Args:
        file_name: within models/identities, with or without .safetensors; empty for the name.
        embedding: write its word to models/embeddings too.
        lora: write its change of the model to models/loras too.
        overwrite: replace files that are there.

    Returns:
        The files, the identity's first.

    Raises:
        ValueError: a name that leads elsewhere, a file that is there, a part that the identity has
            not, or a file that cannot be written.
    """
    file_name = _stem(file_name) or identity.name
    paths = [tensor_files.place_of(folder, file_name)]
    contents = [_content(identity)]
    if embedding:
        if not identity.vectors:
            raise ValueError("embedding is on, but the identity has no learned word: turn it off")
        paths.append(tensor_files.place_of("embeddings", file_name))
        named = {_embedding_keys.get(key, key): v for key, v in identity.vectors.items()}
        contents.append((named, {}))
    if lora:
        if not identity.lora:
            raise ValueError(
                "lora is on, but the identity changes no weights of the model: turn it off"
            )
        paths.append(tensor_files.place_of("loras", file_name))
        contents.append((identity.lora, {}))
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(
                f"file_name is {file_name}, and {path} exists: choose another name, or turn on "
                "overwrite"
            )
    for path, content in zip(paths, contents, strict=True):
        tensor_files.write(path, *content)
    return paths


def _stem(file_name: str) -> str:
    return file_name.strip().removesuffix(tensor_files.suffix)


def save_partial(identity: Identity) -> Path:
    """Write an identity whose learning was stopped, in place of an earlier one.

    Raises:
        ValueError: it cannot be written.
    """
    path = tensor_files.place_of(folder, f"{identity.name}.partial")
    tensor_files.write(path, *_content(identity))
    return path


def _content(identity: Identity) -> tuple[dict[str, Tensor], dict[str, str]]:
    vectors = {f"vectors.{key}": tensor for key, tensor in identity.vectors.items()}
    metadata = {
        "format": _format,
        "format_version": str(_version),
        "name": identity.name,
        "class_word": identity.class_word,
        "family": identity.family,
        "recipe": json.dumps(identity.recipe),
    }
    return {**vectors, **identity.lora}, metadata


def load(file_name: str) -> Identity:
    """Read an identity.

    Args:
        file_name: one of `names`.

    Raises:
        ValueError: the file is not there, not whole, no identity, or one of a newer Pinpoint.
    """
    path = tensor_files.path_of(folder, file_name)
    try:
        # Learning goes on from tensors that are not bound to inference.
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _require_format(metadata, file_name)
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"identity {file_name} cannot be read ({error}): the file is damaged or no safetensors "
            "file; save or download it again"
        ) from error
    return _identity(metadata, tensors, file_name)


def _require_format(metadata: dict[str, str], file_name: str) -> None:
    if metadata.get("format") != _format:
        raise ValueError(
            f"identity {file_name} was not written by Save Identity: load embeddings and LoRAs "
            "with ComfyUI's own nodes"
        )
    if metadata.get("format_version") != str(_version):
        raise ValueError(
            f"identity {file_name} has format {metadata.get('format_version')}, this Pinpoint "
            f"knows {_version}: update Pinpoint"
        )


def _identity(metadata: dict[str, str], tensors: dict[str, Tensor], file_name: str) -> Identity:
    wrong = f"identity {file_name} is damaged: "
    cure = "; save or download it again"
    texts = [metadata.get(key) for key in ("name", "class_word", "family")]
    if None in texts:
        raise ValueError(f"{wrong}it does not say its name, class word and model family{cure}")
    try:
        recipe = json.loads(metadata.get("recipe", ""))
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"{wrong}its recipe cannot be read{cure}")
    vectors, lora = {}, {}
    for key, tensor in tensors.items():
        if not tensor_files.is_finite(tensor):
            raise ValueError(f"{wrong}{key} holds values that are not finite numbers{cure}")
        if key.startswith("vectors.") and tensor.ndim == 2 and len(tensor):
            vectors[key.removeprefix("vectors.")] = tensor.float()
        elif _lora_key.fullmatch(key):
            lora[key] = tensor
        else:
            raise ValueError(f"{wrong}it holds {key}, which is not a part of an identity{cure}")
    for module in {key.rsplit(".lora", 1)[0].removesuffix(".alpha") for key in lora}:
        if not _is_whole(*(lora.get(f"{module}.{part}") for part in _parts)):
            raise ValueError(f"{wrong}the change of {module} is not whole{cure}")
    name = require_name(metadata["name"], f"name in {file_name}")
    told = {str(key): str(value) for key, value in recipe.items()}
    return Identity(name, metadata["class_word"], metadata["family"], vectors, lora, told)


def _is_whole(up: Tensor | None, down: Tensor | None, alpha: Tensor | None) -> bool:
    if up is None or down is None or not up.ndim == down.ndim == 2:
        return False
    return up.shape[1] == len(down) and (alpha is None or alpha.numel() == 1)
