"""A photograph that nobody here drew: scikit-image's astronaut (Eileen Collins, NASA)."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def astronaut(side: int) -> Tensor:
    """(1, side, side, 3) in [0, 1]."""
    from skimage import data

    return _image(Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.LANCZOS))


def through_jpeg(image: Tensor, quality: int = 30) -> Tensor:
    """A picture (1, H, W, 3) as a JPEG of that quality keeps it."""
    file = io.BytesIO()
    pixels = (image[0] * 255).round().byte().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return _image(Image.open(file))


def _image(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]
