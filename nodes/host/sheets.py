"""Pictures side by side with words below them, in Pillow's own font."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_margin, _smallest = 12, 160
"""Around pictures, and the least width of a picture's place, in pixels."""
_ink, _faint, _paper = (40, 40, 40), (110, 110, 110), (255, 255, 255)


@dataclass(frozen=True)
class Labelled:
    """A picture (H, W, 3) in [0, 1], its name, and lines below that."""

    picture: Tensor
    name: str
    lines: Sequence[str] = ()


def sheet(shown: Sequence[Labelled], columns: int) -> Tensor:
    """Pictures of one size in rows, each over its name and lines: (1, H, W, 3)."""
    height, width = shown[0].picture.shape[:2]
    size = max(12, min(width, height) // 20)
    name_font, line_font = (ImageFont.load_default(size=s) for s in (size + 2, size))
    texts = [text for one in shown for text in (one.name, *one.lines)]
    longest = max(int(name_font.getlength(text)) + 1 for text in texts)
    step = max(width, _smallest, min(longest, 2 * width)) + _margin
    text_height = round(size * 1.35)
    block = height + text_height * (1 + max(len(one.lines) for one in shown)) + 2 * _margin
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    canvas = Image.new("RGB", (columns * step + _margin, rows * block + _margin), _paper)
    draw = ImageDraw.Draw(canvas)
    for index, one in enumerate(shown):
        left = _margin + index % columns * step
        top = _margin + index // columns * block
        canvas.paste(_image(one.picture), (left, top))
        below = top + height + _margin // 2
        draw.text((left, below), _cut(one.name, name_font, step - _margin), _ink, name_font)
        for number, line in enumerate(one.lines, 1):
            place = (left, below + number * text_height)
            draw.text(place, _cut(line, line_font, step - _margin), _faint, line_font)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)[None]


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.cpu().clamp(0, 1) * 255).round().byte().numpy())


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text that fits a width, with an ellipsis where it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
