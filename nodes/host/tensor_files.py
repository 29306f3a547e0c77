"""Safetensors files in ComfyUI's folders: found, read and checked, written whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.ops
import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

suffix = ".safetensors"
longest_name = 200
"""Bytes of a file's or a folder's name; file systems take 255, endings included."""
_file_name = re.compile(r"[\w+-][\w .+-]*(/[\w+-][\w .+-]*)*")


def register_folder(kind: str) -> None:
    """Make a folder below models known to ComfyUI."""
    folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))


def names(kind: str) -> list[str]:
    """The safetensors files of a folder below models, with their folders in it."""
    return [name for name in folder_paths.get_filename_list(kind) if name.endswith(suffix)]


def path_of(kind: str, file_name: str, input_name: str = "file_name") -> Path:
    """A file in one of ComfyUI's folders of a kind.

    Args:
        input_name: that it was chosen for.

    Raises:
        ValueError: it is not there.
    """
    path = folder_paths.get_full_path(kind, file_name)
    if path is None:
        raise ValueError(
            f"{input_name} is {file_name}, which is not in models/{kind}: choose another, or put "
            "it there"
        )
    return Path(path)


def place_of(kind: str, file_name: str) -> Path:
    """A file to be written in the first of ComfyUI's folders of a kind.

    Raises:
        ValueError: a name that leads out of it, or is too long.
    """
    root = Path(folder_paths.get_folder_paths(kind)[0]).resolve()
    length = max(len(part.encode()) for part in file_name.split("/"))
    if length > longest_name:
        raise ValueError(
            f"file_name has a part of {length} bytes: write one of at most {longest_name}"
        )
    if _file_name.fullmatch(file_name):
        path = (root / f"{file_name}{suffix}").resolve()
        # Links may lead elsewhere.
        if path.is_relative_to(root):
            return path
    raise ValueError(
        f"file_name is '{file_name}': write a name such as ann or people/ann, which lies in {root}"
    )


def fingerprint(path: Path) -> str:
    """Differs for another file by the same name."""
    state = path.stat()
    return f"{state.st_mtime_ns} {state.st_size}"


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, part: str = "part"
) -> None:
    """Write a safetensors file; what was there stays until the new one is whole.

    Args:
        part: ending of the file that is not yet whole; of their own for several writers at once.

    Raises:
        ValueError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{part}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The format's own files can be read by nobody else, whatever is usual here.
        unfinished.touch()
        usual = unfinished.stat().st_mode
        # Wires carry tensors that share memory, which the format does not allow; their device may
        # be full.
        whole = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
        save_file(whole, unfinished, metadata)
        unfinished.chmod(usual)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be written ({error}): free space on the disk, or check who may write "
            "there"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def read(
    path: Path, only: Mapping[str, int | None] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Args:
        only: the tensors that are read, all if not given; a number means this row alone.

    Raises:
        ValueError: it is damaged, no safetensors file, or holds values that are not finite.
    """
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            wanted = dict.fromkeys(file.keys()) if only is None else only
            tensors = {
                key: file.get_tensor(key) if row is None else file.get_slice(key)[row]
                for key, row in wanted.items()
            }
            metadata = file.metadata() or {}
    except (OSError, IndexError, SafetensorError) as error:
        raise ValueError(
            f"file {path.name} cannot be read ({error}): it is damaged or no safetensors file; "
            "download or save it again"
        ) from error
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"file {path.name} is damaged: {key} holds values that are not finite numbers; "
                "download or save it again"
            )
    return tensors, metadata


def is_finite(tensor: Tensor) -> bool:
    """Whether all of it are finite numbers with a fraction."""
    # Of eight-bit floats PyTorch does not know.
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def filled(build: Any, tensors: Mapping[str, Tensor], file_name: str) -> Any:
    """A network with a file's weights, of ComfyUI's layers, which cast them as they compute.

    Args:
        build: makes it of given layers.

    Raises:
        ValueError: tensors that are missing, too many, or of other sizes.
    """
    with torch.device("meta"):
        expected = {key: t.shape for key, t in build(nn).state_dict().items()}
    found = {key: t.shape for key, t in tensors.items()}
    wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if wrong:
        raise ValueError(
            f"file {file_name} is not whole: {len(wrong)} of its tensors are missing, too many or "
            f"of another size, the first is {wrong[0]}; download or save it again"
        )
    with torch.device("meta"):
        network = build(comfy.ops.manual_cast)
    network.load_state_dict(dict(tensors), assign=True)
    return network.requires_grad_(False).eval()
