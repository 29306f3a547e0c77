"""A case of a protocol: a picture, the words of its edit, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Size = tuple[int, int]
largest_crop = 32
"""Sizes that a VAE takes are multiples of this at most, in pixels; so it crops by less."""


class ProtocolError(Exception):
    """A run cannot start or go on; the message says why and what to do."""


class BadCase(Exception):
    """One case cannot be run or judged; the run goes on with the next."""


@dataclass(frozen=True)
class Case:
    """One edit to be made.

    Attributes:
        id: unique in its protocol, and a relative path.
        image: the source, or the subject that a new picture shall show.
        instruction: for models that are told what to do instead of what shall be.
        group: for summaries of a part: an edit type, a subject.
        mask: makes the mask at the picture's own size, 255 = edit; see `mask_at`.
        references: all pictures of the subject.
        seed: of the case, where its protocol asks for several.
        attribute, value: what the edit changes, and to which of the protocol's phrases.
        drawn: how a drawn portrait's judge knows it; see `drawn`.
    """

    id: str
    image: Path
    source_prompt: str
    target_prompt: str
    instruction: str = ""
    group: str = ""
    mask: Callable[[Size], Image.Image] | None = None
    references: tuple[Path, ...] = ()
    seed: int | None = None
    attribute: str = ""
    value: str = ""
    drawn: Mapping[str, Any] | None = None

    def mask_at(self, size: Size) -> Image.Image | None:
        """The mask of the picture in another size, 255 = edit; None if the case has none.

        Raises:
            BadCase: the picture or the mask cannot be opened.
        """
        if self.mask is None:
            return None
        return self.mask(opened(self.image).size).resize(size, Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Protocol:
    """What is run and how it is reported.

    Attributes:
        name: of its command.
        cases: all of them.
        scores: those of Edit Score to report, in order.
        lpips: the network that its published figures are of.
        attributes: name -> phrases of its values, for protocols that ask which one a picture shows.
    """

    name: str
    cases: list[Case]
    scores: tuple[str, ...]
    lpips: str = "alex"
    attributes: Mapping[str, list[str]] = field(default_factory=dict)


def opened(path: Path) -> Image.Image:
    """A picture in RGB, upright.

    Raises:
        BadCase: it is missing or no picture.
    """
    return _in_eight_bits(_upright(path)).convert("RGB")


def opened_mask(path: Path, size: Size) -> Image.Image:
    """A mask in L at a size, 255 = edit: the file's alpha where that is not full, or its light.

    Raises:
        BadCase: it is missing or no picture.
    """
    picture = _upright(path)
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha.resize(size, Image.Resampling.NEAREST)
    return _in_eight_bits(picture).convert("L").resize(size, Image.Resampling.NEAREST)


def _upright(path: Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except (OSError, UnidentifiedImageError) as error:
        raise BadCase(f"{path} cannot be opened ({error}): put the picture there") from error


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow clips 16 bits of grey where it should scale them."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture, np.float64) / 257).round().astype(np.uint8))


def scaled(picture: Image.Image, size: Size) -> Image.Image:
    """A picture in another size, averaged where that is possible without a filter."""
    if picture.size == size:
        return picture
    (width, height), (old_width, old_height) = size, picture.size
    if old_width % width == 0 and old_height % height == 0:
        return picture.reduce((old_width // width, old_height // height))
    return picture.resize(size, Image.Resampling.LANCZOS)


def at_size_of(source: Image.Image, edit: Image.Image) -> Image.Image:
    """An edit at its source's size.

    One that is less than a VAE's crop smaller is laid where VAE Encode crops it from, and the rest
    is the source's; any other is scaled.
    """
    across, down = (a - b for a, b in zip(source.size, edit.size, strict=True))
    if not (0 <= across < largest_crop and 0 <= down < largest_crop):
        return scaled(edit, source.size)
    laid = source.copy()
    laid.paste(edit, (across // 2, down // 2))
    return laid


def limited(size: Size, longest: int | None) -> Size:
    """A size whose longer side is `longest`, in its proportions; as it is for None."""
    if longest is None:
        return size
    factor = longest / max(size)
    return (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
