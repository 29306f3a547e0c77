"""Pictures side by side with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

HEIGHT = 384
MARGIN = 12
CAPTION = 28
SMOOTH = Image.Resampling.LANCZOS
INK, PAPER = (40, 40, 40), (255, 255, 255)


def side_by_side(
    pictures: Sequence[Image.Image | None], names: Sequence[str], title: str
) -> Image.Image:
    """The pictures scaled to one height, each over its name, and the title below them all.

    A missing picture is left out with its name.
    """
    shown = [
        (picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT), SMOOTH), name)
        for picture, name in zip(pictures, names, strict=True)
        if picture
    ]
    width = sum(picture.width + MARGIN for picture, _ in shown) + MARGIN
    sheet = Image.new("RGB", (width, HEIGHT + 2 * CAPTION + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    x = MARGIN
    for picture, name in shown:
        sheet.paste(picture, (x, MARGIN))
        draw.text((x, MARGIN + HEIGHT + 4), name, INK, font)
        x += picture.width + MARGIN
    line = textwrap.shorten(title, width // 9, placeholder=" ...")
    draw.text((MARGIN, MARGIN + HEIGHT + 4 + CAPTION), line, INK, font)
    return sheet
