"""Subjects cut out of pictures and brought into squares. Pictures are (H, W, C) in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Color = Sequence[float]
"""Red, green and blue in [0, 1]."""


def on_color(picture: Tensor, color: Color) -> Tensor:
    """Grey (1 channel), RGB (3) or RGBA (4) as RGB, the colour behind transparent places."""
    if picture.shape[-1] == 4:
        return over_color(picture[..., :3], picture[..., 3], color)
    return picture.expand(*picture.shape[:2], 3)


def over_color(picture: Tensor, opacity: Tensor, color: Color) -> Tensor:
    """Lay a picture over a colour: (H, W, 3) and (H, W) in [0, 1] -> (H, W, 3).

    Where the opacity is 1 the picture is unchanged, bit for bit.
    """
    shown = opacity[..., None].to(picture)
    return picture * shown + picture.new_tensor(color) * (1 - shown)


def box_around(mask: Tensor, margin: float, threshold: float = 0.5) -> tuple[slice, slice] | None:
    """Rows and columns of the smallest box around a mask, widened but within the picture.

    Args:
        mask: (H, W), 1 = inside.
        margin: on every side, in parts of the box's longer side, rounded to pixels.
        threshold: values from here on are inside.

    Returns:
        None where nothing is inside.
    """
    inside = mask >= threshold
    rows, columns = (inside.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return None
    longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    wider = round(margin * longer)
    return _widened(rows, wider, mask.shape[0]), _widened(columns, wider, mask.shape[1])


def _widened(inside: list[int], wider: int, size: int) -> slice:
    return slice(max(0, inside[0] - wider), min(size, inside[-1] + 1 + wider))


def padded_square(picture: Tensor, color: Color) -> Tensor:
    """The whole picture in the middle of a square of its longer side; a colour fills the rest.

    Of an odd rest, the pixel that is over goes below or to the right.
    """
    height, width, channels = picture.shape
    side = max(height, width)
    if height == width:
        return picture
    square = picture.new_tensor(color).expand(side, side, channels).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def centre_square(picture: Tensor) -> Tensor:
    """The middle of a picture, as a square of its shorter side."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]
