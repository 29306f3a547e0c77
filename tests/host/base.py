"""ComfyUI base directories: models, input, output, user files, and the pack as a custom node."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

from .comfyui import PACK, cache_folder

NAME = "pinpoint"
FOLDERS = (
    "models/checkpoints",
    "input",
    "output",
    "temp",
    "user/default/workflows",
    "custom_nodes",
)


def make_base(folder: Path, *, checkpoint: bool = True, pack: Path = PACK) -> Path:
    """Prepare a base directory, or bring an existing one up to date, and return it.

    The demo models are kept once per user, in the cache folder, and linked from every base;
    `checkpoint=False` leaves them out.
    """
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    link_folder(pack, folder / "custom_nodes" / NAME)
    if checkpoint:
        from portraits.checkpoint import ensure

        kept = cache_folder() / "models"
        for file in ensure(kept):
            place = folder / "models" / file.relative_to(kept)
            place.parent.mkdir(exist_ok=True)
            link_file(file, place)
    return folder


def link_folder(source: Path, target: Path) -> None:
    """Make `target` a link to the folder `source`, in place of a link to another."""
    if target.exists() and target.samefile(source):
        return
    # Both are true of links only, so a real folder is never taken away.
    if target.is_symlink():
        target.unlink()
    elif _is_junction(target):
        target.rmdir()
    try:
        if sys.platform == "win32":
            # Unlike a symbolic link, a junction needs no special right.
            import _winapi

            _winapi.CreateJunction(str(source), str(target))
        else:
            target.symlink_to(source, target_is_directory=True)
    except OSError as error:
        raise OSError(
            f"{target} could not be linked to {source} ({error}): if a folder of that name is "
            "in the way, move it; else choose a disk whose file system has links"
        ) from error


def link_file(source: Path, target: Path) -> None:
    """Give a large file a second place: a hard link, else a symbolic link, else a copy."""
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    for link in (os.link, os.symlink):
        with contextlib.suppress(OSError):
            link(source, target)
            return
    shutil.copyfile(source, target)


def _is_junction(path: Path) -> bool:
    # os.path.isjunction is new in Python 3.12.
    return sys.platform == "win32" and path.is_dir() and bool(path.lstat().st_reparse_tag)
