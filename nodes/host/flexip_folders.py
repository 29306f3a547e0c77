"""Folders of pictures with captions and masks, that FlexIP adapters are trained from.

invariant/PICTURE             is reference and goal at once
variant/SUBJECT/PICTURE       two or more of one subject: one is the reference of another
(beside each) NAME.txt        its caption
(beside each) NAME.mask.png   optional; white is the subject, the rest of a reference is removed
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

suffixes = (".png", ".jpg", ".jpeg", ".webp")
_mask_suffix = ".mask.png"
_kinds = ("invariant", "variant")


@dataclass(frozen=True)
class Picture:
    """A picture with its caption and its mask.

    Attributes:
        path: of the picture.
        name: within the folder, for errors.
    """

    path: Path
    name: str

    @property
    def caption_path(self) -> Path:
        """Where its caption belongs."""
        return self.path.with_suffix(".txt")

    @property
    def mask_path(self) -> Path:
        """Where its mask belongs."""
        return self.path.with_name(f"{self.path.stem}{_mask_suffix}")

    def caption(self) -> str:
        """What the picture shows; may be empty.

        Raises:
            ValueError: it is no text.
        """
        try:
            return self.caption_path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"caption of {self.name} cannot be read ({error}): save it as UTF-8 text"
            ) from error

    def stamp(self) -> str:
        """Changes with the picture or its mask."""
        return f"{_stamp(self.path)} {_stamp(self.mask_path)}"

    def pixels(self) -> Tensor:
        """(1, H, W, 3), or 4 with transparency, in [0, 1].

        Raises:
            ValueError: it cannot be read.
        """
        picture = _opened(self.path, self.name)
        has_alpha = "A" in picture.getbands() or "transparency" in picture.info
        return _tensor(picture.convert("RGBA" if has_alpha else "RGB"))[None]

    def mask(self) -> Tensor | None:
        """(1, H, W), 1 = subject.

        Raises:
            ValueError: it cannot be read, is of another size, or empty.
        """
        if not self.mask_path.exists():
            return None
        name = str(Path(self.name).with_name(self.mask_path.name))
        mask = _opened(self.mask_path, name).convert("L")
        size = _opened(self.path, self.name).size
        if mask.size != size:
            (width, height), (columns, rows) = mask.size, size
            raise ValueError(
                f"mask {name} is {width}x{height}, its picture {columns}x{rows}: save it at the "
                "picture's size"
            )
        found = _tensor(mask)[None]
        if not (found >= 0.5).any():
            raise ValueError(
                f"mask {name} is black, so there is no subject: paint it white, or delete the mask"
            )
        return found


@dataclass(frozen=True)
class Collection:
    """What a folder holds.

    Attributes:
        invariant: pictures that are their own reference.
        subjects: of each, two pictures or more.
    """

    invariant: tuple[Picture, ...]
    subjects: tuple[tuple[Picture, ...], ...]

    @property
    def pictures(self) -> list[Picture]:
        """All of them."""
        return [*self.invariant, *(picture for group in self.subjects for picture in group)]

    def __str__(self) -> str:
        several = sum(map(len, self.subjects))
        return (
            f"{len(self.invariant)} invariant pictures, {several} variant ones of "
            f"{len(self.subjects)} subjects"
        )


def inside_input(folder: str) -> Path:
    """A folder in ComfyUI's input folder.

    Raises:
        ValueError: it lies elsewhere, or is not there.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    try:
        path = (root / folder.strip()).resolve()
        is_inside = bool(folder.strip()) and path.is_relative_to(root) and path != root
    except (OSError, ValueError):
        is_inside = False
    if not is_inside:
        raise ValueError(
            f"folder is '{folder}': write the name of a folder in {root}, which holds the pictures"
        )
    return path


def found(root: Path) -> Collection:
    """Look through a folder.

    Raises:
        ValueError: there are no pictures, only one of a subject, or captions are missing.
    """
    invariant = _pictures(root, root / _kinds[0])
    variant = root / _kinds[1]
    inside = sorted(variant.iterdir()) if variant.is_dir() else []
    folders = [path for path in inside if path.is_dir() and not path.name.startswith(".")]
    subjects = [group for folder in folders if (group := _pictures(root, folder))]
    if not invariant and not subjects:
        raise ValueError(
            f"folder {root} has no pictures in invariant or in folders of variant: put PNG, JPEG "
            "or WebP files there"
        )
    for group in subjects:
        if len(group) == 1:
            raise ValueError(
                f"folder {Path(group[0].name).parent} has one picture, and a subject needs two or "
                "more: add others of the same subject, or move it to invariant"
            )
    collection = Collection(tuple(invariant), tuple(map(tuple, subjects)))
    _require_no_others(root, collection)
    silent = [picture for picture in collection.pictures if not picture.caption_path.is_file()]
    if silent:
        names = ", ".join(picture.name for picture in silent[:3])
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        raise ValueError(
            f"captions are missing for {names}{more}: write what each shows into a text file of "
            f"its name, such as {Path(silent[0].name).with_suffix('.txt')}"
        )
    return collection


def fingerprint(root: Path) -> str:
    """Changes with anything that the folder's pairs are made of."""
    seen = hashlib.sha256()
    for kind in _kinds:
        for path in sorted((root / kind).rglob("*")):
            seen.update(f"{path.relative_to(root)} {_stamp(path)}\n".encode())
    return seen.hexdigest()


def _pictures(root: Path, folder: Path) -> list[Picture]:
    if not folder.is_dir():
        return []
    return [
        Picture(path, str(path.relative_to(root)))
        for path in sorted(folder.iterdir())
        if _is_picture(path)
    ]


def _is_picture(path: Path) -> bool:
    # Some systems put hidden files with the same endings beside pictures.
    is_named = path.suffix.lower() in suffixes and not path.name.startswith(".")
    return is_named and not path.name.endswith(_mask_suffix)


def _require_no_others(root: Path, collection: Collection) -> None:
    """Refuse pictures that would not be used where they lie."""
    used = {picture.path for picture in collection.pictures}
    for kind in _kinds:
        for path in sorted((root / kind).rglob("*")):
            inside = path.relative_to(root)
            if _is_picture(path) and path not in used and not _is_hidden(inside):
                raise ValueError(
                    f"picture {inside} lies where it is not used: put pictures into invariant, or "
                    "into one folder of variant for each subject, with no folders between"
                )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _stamp(path: Path) -> str:
    if not path.exists():
        return ""
    state = path.stat()
    return f"{state.st_mtime_ns} {state.st_size}"


def _opened(path: Path, name: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return _in_8_bits(ImageOps.exif_transpose(file))
    except (
        OSError,
        SyntaxError,
        ValueError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"picture {name} cannot be read ({error}): save it again, or take it away"
        ) from error


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """PIL clips what has 16 bits where it converts it."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture, np.float32) / 257).round().astype(np.uint8))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
