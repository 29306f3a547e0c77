"""The portrait drawer: signed distances to coverage to painted layers, vectorised over people.

Coordinates run from -1 to 1 over the picture, x to the right and y down. The drawing is
differentiable in the identity parameters, so that an identity can be recovered from a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .people import Portrait, identity_ranges

palette = {
    "black": (0.08, 0.08, 0.10),
    "brown": (0.42, 0.25, 0.13),
    "blond": (0.90, 0.76, 0.36),
    "red": (0.78, 0.16, 0.12),
    "white": (0.93, 0.93, 0.93),
    "blue": (0.16, 0.36, 0.85),
    "green": (0.15, 0.62, 0.28),
    "purple": (0.55, 0.22, 0.70),
    "orange": (0.95, 0.55, 0.12),
    "pink": (0.95, 0.55, 0.70),
    "gray": (0.50, 0.52, 0.55),
    "yellow": (0.97, 0.87, 0.20),
}
skin_tones = {
    "pale": (0.98, 0.85, 0.75),
    "tan": (0.85, 0.63, 0.46),
    "brown": (0.60, 0.40, 0.27),
    "dark": (0.36, 0.23, 0.16),
}
lip_colors = {
    "natural": (0.72, 0.36, 0.34),
    "red": (0.86, 0.05, 0.12),
    "purple": (0.45, 0.10, 0.55),
}
mouth_curves = {"smiling": -1.0, "neutral": 0.0, "sad": 1.0, "surprised": 0.0}


def ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Approximate signed distance to an axis-aligned ellipse (exact for a circle)."""
    rx, ry = torch.as_tensor(rx), torch.as_tensor(ry)
    return (((x / rx) ** 2 + (y / ry) ** 2 + 1e-9).sqrt() - 1) * torch.minimum(rx, ry)


def box(
    x: Tensor,
    y: Tensor,
    half_width: Tensor | float,
    half_height: Tensor | float,
    radius: float = 0.0,
) -> Tensor:
    """Signed distance to a box with rounded corners."""
    dx, dy = x.abs() - half_width + radius, y.abs() - half_height + radius
    outside = (dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2 + 1e-12).sqrt()
    return outside - radius + torch.maximum(dx, dy).clamp(max=0)


class Canvas:
    """A batch of pictures being painted, with the people's parameters at hand."""

    def __init__(self, portraits: Sequence[Portrait], identity: Tensor, size: int):
        self.portraits = portraits
        axis = (torch.arange(size) + 0.5) / size * 2 - 1
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")
        self.identity = {
            name: column.view(-1, 1, 1)
            for name, column in zip(identity_ranges, identity.unbind(1), strict=True)
        }
        self.edge = 1.5 * 2 / size
        self.image = torch.zeros(len(portraits), 3, size, size)

    def colors(self, table: dict[str, tuple[float, float, float]], attribute: str) -> Tensor:
        """Each person's colour for an attribute, (B, 3, 1, 1); black where the table has none."""
        values = [table.get(p.attributes[attribute], (0.0, 0.0, 0.0)) for p in self.portraits]
        return torch.tensor(values).view(-1, 3, 1, 1)

    def where(self, attribute: str, *values: str) -> Tensor:
        """1 for the people whose attribute has one of the values, (B, 1, 1)."""
        chosen = [float(p.attributes[attribute] in values) for p in self.portraits]
        return torch.tensor(chosen).view(-1, 1, 1)

    def paint(self, distance: Tensor, color: Tensor, visible: Tensor | float = 1.0) -> None:
        """Cover the inside of a shape (signed distance < 0) with a colour, edges anti-aliased."""
        coverage = ((0.5 - distance / self.edge).clamp(0, 1) * visible)[:, None]
        self.image = torch.lerp(self.image, color, coverage)


def rgb(*color: float) -> Tensor:
    """One colour for everyone, (1, 3, 1, 1)."""
    return torch.tensor(color).view(1, 3, 1, 1)


def draw(portraits: Sequence[Portrait], size: int = 128, identity: Tensor | None = None) -> Tensor:
    """Paint portraits.

    Args:
        portraits: B people.
        size: height and width in pixels.
        identity: (B, parameters) in place of the people's own, e.g. one that is being fitted.

    Returns:
        (B, 3, size, size), 0..1.
    """
    if identity is None:
        identity = torch.tensor([p.identity for p in portraits])
    canvas = Canvas(portraits, identity, size)
    shade = (1 - 0.14 * (canvas.y * 0.5 + 0.5))[None, None]
    canvas.image = canvas.colors(palette, "background") * shade
    x, y = canvas.x - canvas.identity["center x"], canvas.y - canvas.identity["center y"]
    bald = canvas.where("hair length", "bald")[:, None]
    hair = torch.lerp(canvas.colors(palette, "hair"), rgb(*palette["brown"]), bald)
    hair = hair * (1 - 0.25 * (y[:, None] + 0.4).clamp(-0.3, 0.6))
    skin = canvas.colors(skin_tones, "skin")
    _paint_body(canvas, x, y, hair, skin)
    _paint_head(canvas, x, y, hair, skin)
    _paint_eyes(canvas, x, y, skin)
    _paint_lower_face(canvas, x, y, hair, skin)
    _paint_eyewear(canvas, x, y)
    _paint_hat(canvas, x, y)
    return canvas.image.clamp(0, 1)


def _head_width(canvas: Canvas, y: Tensor) -> Tensor:
    return canvas.identity["face width"] * (1 - canvas.identity["jaw"] * y.clamp(min=0))


def _paint_body(canvas: Canvas, x: Tensor, y: Tensor, hair: Tensor, skin: Tensor) -> None:
    width, height = canvas.identity["face width"], canvas.identity["face height"]
    behind = torch.minimum(
        ellipse(x, y + 0.14, width + 0.15, height * 0.86),
        box(x, y - 0.24, width + 0.13, 0.44, 0.12),
    )
    canvas.paint(behind, hair * 0.82, canvas.where("hair length", "long"))
    canvas.paint(box(x, y - 0.62, width * 0.36, 0.25, 0.05), skin * 0.85)
    shirt = canvas.colors(palette, "shirt")
    canvas.paint(box(x, y - 1.12, 0.80, 0.38, 0.26), shirt)
    collar = torch.maximum(
        ellipse(x, y - 0.74, width * 0.52, 0.15), -ellipse(x, y - 0.71, width * 0.40, 0.11)
    )
    canvas.paint(torch.maximum(collar, 0.74 - y), shirt * 0.78)


def _paint_head(canvas: Canvas, x: Tensor, y: Tensor, hair: Tensor, skin: Tensor) -> None:
    width, height = canvas.identity["face width"], canvas.identity["face height"]
    ears = ellipse(x.abs() - width, y - 0.02, 0.065, 0.105)
    canvas.paint(ears, skin * 0.92)
    canvas.paint(
        ellipse(x, y, _head_width(canvas, y), height),
        skin * (1.02 - 0.10 * (y[:, None] + 0.2).clamp(0, 1)),
    )
    hairline = y + 0.27 - 0.10 * torch.cos(x * 5)
    cap = torch.maximum(ellipse(x, y + 0.06, width + 0.055, height), hairline)
    canvas.paint(cap, hair, canvas.where("hair length", "short", "long"))


def _paint_eyes(canvas: Canvas, x: Tensor, y: Tensor, skin: Tensor) -> None:
    size = canvas.identity["eye size"]
    ex, ey = x.abs() - canvas.identity["eye distance"], y - canvas.identity["eye height"]
    canvas.paint(ellipse(ex, ey, size * 1.3, size), rgb(0.98, 0.98, 0.98))
    canvas.paint(ellipse(ex, ey, size * 0.75, size * 0.75), canvas.colors(palette, "eyes"))
    canvas.paint(ellipse(ex, ey, size * 0.34, size * 0.34), rgb(0.02, 0.02, 0.03))
    raised = 0.05 * canvas.where("expression", "surprised")
    by = ey + size * 1.65 + raised + canvas.identity["brow tilt"] * ex
    canvas.paint(box(ex, by, size * 1.35, canvas.identity["brow thickness"], 0.012), skin * 0.35)


def _paint_lower_face(canvas: Canvas, x: Tensor, y: Tensor, hair: Tensor, skin: Tensor) -> None:
    length = canvas.identity["nose length"]
    canvas.paint(
        ellipse(x, y - length * 0.9, canvas.identity["nose width"], length * 0.55), skin * 0.84
    )
    mouth_y, mouth_x = y - canvas.identity["mouth height"], x / canvas.identity["mouth width"]
    chin = torch.maximum(
        ellipse(x, y, _head_width(canvas, y), canvas.identity["face height"]), 0.16 - y
    )
    beard = torch.maximum(chin, -ellipse(x, mouth_y, canvas.identity["mouth width"] * 1.2, 0.095))
    canvas.paint(beard, hair * 0.72, canvas.where("beard", "full"))

    lips, surprised = canvas.colors(lip_colors, "lips"), canvas.where("expression", "surprised")
    curve = torch.tensor([mouth_curves[p.attributes["expression"]] for p in canvas.portraits])
    bend = curve.view(-1, 1, 1) * 0.075 * (mouth_x.clamp(-1.5, 1.5) ** 2 - 0.5)
    line = torch.maximum((mouth_y - bend).abs() - 0.036, x.abs() - canvas.identity["mouth width"])
    canvas.paint(line, lips, 1 - surprised)
    opening = ellipse(x, mouth_y, 0.085, 0.105)
    canvas.paint(opening, lips, surprised)
    canvas.paint(opening + 0.045, rgb(0.16, 0.03, 0.05), surprised)

    mole = canvas.identity["mole size"]
    spot = ((x - canvas.identity["mole x"]) ** 2 + (y - 0.17) ** 2 + 1e-9).sqrt() - mole
    canvas.paint(spot, skin * 0.45, (mole / 0.01).clamp(0, 1))


def _paint_eyewear(canvas: Canvas, x: Tensor, y: Tensor) -> None:
    size, distance = canvas.identity["eye size"], canvas.identity["eye distance"]
    ex, ey = x.abs() - distance, y - canvas.identity["eye height"]
    lens = ellipse(ex, ey, size * 1.62, size * 1.5)
    worn, frame = canvas.where("eyewear", "round", "dark"), rgb(0.10, 0.10, 0.12)
    canvas.paint(lens, rgb(0.06, 0.06, 0.08), canvas.where("eyewear", "dark"))
    canvas.paint(lens.abs() - 0.022, frame, worn)
    canvas.paint(box(x, ey, (distance - size * 1.62).clamp(min=0.0), 0.018), frame, worn)


def _paint_hat(canvas: Canvas, x: Tensor, y: Tensor) -> None:
    width, height = canvas.identity["face width"], canvas.identity["face height"]
    color, worn = canvas.colors(palette, "hat"), 1 - canvas.where("hat", "no")
    crown = torch.maximum(ellipse(x, y + 0.20, width + 0.08, height * 0.94), y + 0.36)
    canvas.paint(crown, color * (1 - 0.2 * (y[:, None] + 0.6).clamp(-0.3, 0.3)), worn)
    canvas.paint(box(x, y + 0.35, width + 0.22, 0.055, 0.04), color * 0.85, worn)
