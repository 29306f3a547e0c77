"""Checks and fits of node inputs; every refusal names the input, its value and the cure."""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...kernels import masks

largest_crop = 32
"""VAEs crop a picture to whole latent cells, at most 32 pixels wide."""


def require_valid(node: type[io.ComfyNode], values: dict[str, Any]) -> None:
    """Refuse widget values that the node's schema does not allow.

    ComfyUI checks typed values only, not those that come by wire, and lets NaN through.
    """
    for widget in node.define_schema().inputs:
        value = values.get(widget.id)
        if isinstance(widget, io.Combo.Input) and value not in widget.options:
            choices = ", ".join(widget.options)
            raise ValueError(f"{widget.id} is {value}: choose one of {choices}")
        if not isinstance(widget, io.Int.Input | io.Float.Input) or value is None:
            continue
        if not widget.min <= value <= widget.max:
            raise ValueError(
                f"{widget.id} is {value:g}: enter a number from {widget.min:g} to {widget.max:g}"
            )


def latent_samples(model: ModelPatcher, latent: dict) -> Tensor:
    """The tensor of a LATENT, checked against the model's latent space.

    Raises:
        ValueError: several latents in one, another number of channels, or values that are not
            finite.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError("latent holds several latents (video with audio): separate them first")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    expected = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != expected:
        raise ValueError(
            f"latent has {samples.shape[1]} channels, the model needs {expected}: encode the "
            "picture with the VAE that belongs to the model"
        )
    if not torch.isfinite(samples).all():
        raise ValueError("latent holds values that are not finite: check the picture and the VAE")
    return samples


def pixel_size(model: ModelPatcher, samples: Tensor) -> tuple[int, int]:
    """Height and width in pixels of the picture in a latent."""
    ratio = model.get_model_object("latent_format").spacial_downscale_ratio
    return samples.shape[-2] * ratio, samples.shape[-1] * ratio


def scaled_picture(image: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, 3) at another size, for previews."""
    if image.shape[1:3] == (height, width):
        return image
    channels_first = image.movedim(-1, 1)
    scaled = F.interpolate(channels_first, (height, width), mode="bilinear", align_corners=False)
    return scaled.movedim(1, -1)


def colors(name: str, image: Tensor) -> Tensor:
    """The colours of an IMAGE as (B, 3, H, W), in [0, 1].

    Raises:
        ValueError: no pictures, other channels than RGB or RGBA, or values that are not finite.
    """
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or not image.numel():
        shape = "x".join(map(str, image.shape))
        raise ValueError(f"{name} is {shape}: use RGB or RGBA pictures of at least one pixel")
    if not image.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: check where it comes from")
    return image[..., :3].movedim(-1, 1).float().clamp(0, 1)


def require_one_picture_each(image: Tensor | None, latent: Tensor) -> None:
    """Refuse pictures that are neither one nor one for each row of a latent."""
    if image is not None and len(image) not in (1, len(latent)):
        raise ValueError(
            f"image has {len(image)} pictures, the latent {len(latent)}: use one picture, or one "
            "for each"
        )


def same_batch(**tensors: Tensor) -> list[Tensor]:
    """Repeat single images to the common batch size.

    Raises:
        ValueError: two different batch sizes above 1.
    """
    count = max(len(tensor) for tensor in tensors.values())
    for name, tensor in tensors.items():
        if len(tensor) not in (1, count):
            raise ValueError(
                f"{name} has {len(tensor)} images where another input has {count}: use one image, "
                f"or {count}"
            )
    return [t.expand(count, *t.shape[1:]) if len(t) == 1 else t for t in tensors.values()]


def placed_over(edited: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Lay an edited picture over its source where VAE Encode cropped it from.

    Returns:
        The edited picture at the source's size (the source where it does not reach), and the
        (1, H, W) area that it covers.

    Raises:
        ValueError: the sizes differ by more than a VAE's crop.
    """
    (height, width), (inner_height, inner_width) = source.shape[1:3], edited.shape[1:3]
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    if not (0 <= height - inner_height < largest_crop and 0 <= width - inner_width < largest_crop):
        raise ValueError(
            f"edited is {inner_width}x{inner_height}, source {width}x{height}: scale one of them "
            "(Upscale Image) so that the sizes agree"
        )
    placed = source[..., :3].clone()
    placed[:, top : top + inner_height, left : left + inner_width] = edited.to(placed)
    covered = placed.new_zeros(1, height, width)
    covered[:, top : top + inner_height, left : left + inner_width] = 1
    return placed, covered


def placed_mask(mask: Tensor, covered: Tensor, source: Tensor) -> Tensor:
    """A mask at the source's size; one that fits the covered area exactly is laid over that."""
    mask = mask.to(covered).clamp(0, 1)
    rows, columns = covered[0].any(1).nonzero(), covered[0].any(0).nonzero()
    if mask.shape[1:] != (len(rows), len(columns)):
        return masks.resized(mask, *source.shape[1:3])
    placed = mask.new_zeros(len(mask), *source.shape[1:3])
    top, left = int(rows[0]), int(columns[0])
    placed[:, top : top + len(rows), left : left + len(columns)] = mask
    return placed


def mask_batch(mask: Tensor) -> Tensor:
    """A MASK as (B, H, W), which some nodes give without B, or with channels."""
    return mask.reshape(-1, *mask.shape[-2:])


def require_finite_mask(mask: Tensor) -> None:
    """Refuse a mask with NaN or infinity in it."""
    if not torch.isfinite(mask).all():
        raise ValueError("mask holds values that are not finite: check where it comes from")


def require_masks_for(mask: Tensor, rows: int) -> None:
    """Refuse masks (B, H, W) that a branch's rows, one picture or more, are no multiple of."""
    # Edits with several noises at once have all pictures once for each.
    if rows % len(mask):
        raise ValueError(
            f"mask has {len(mask)} images, the latent {rows}: use one mask, or one for each"
        )


def require_part(start: float, end: float) -> None:
    """Refuse an empty part of the sampling, given from 0 (noise) to 1 (picture)."""
    if start >= end:
        raise ValueError(
            f"start is {start:g} and end {end:g}: choose a start below the end, 0 is noise and 1 "
            "the picture"
        )


def mask_on_latent(mask: Tensor, latent: Tensor) -> Tensor:
    """A (B or 1, H, W) mask at a latent's size: (B or 1, 1, [1,] h, w)."""
    if len(mask) not in (1, len(latent)):
        raise ValueError(
            f"mask has {len(mask)} images, the latent {len(latent)}: use one mask, or one for each"
        )
    require_finite_mask(mask)
    fitted = masks.resized(mask.float(), *latent.shape[-2:]).clamp(0, 1).to(latent)
    return fitted.view(len(fitted), *[1] * (latent.ndim - 3), *fitted.shape[-2:])


def compared(mask: Tensor | None = None, **images: Tensor | None) -> dict[str, Tensor]:
    """Pictures that are to be compared as (B, 3, H, W), a mask as (B, H, W) at their size.

    What is not connected is left out.

    Raises:
        ValueError: another size than the source's, and what `colors` and `same_batch` refuse.
    """
    found = {name: colors(name, image) for name, image in images.items() if image is not None}
    height, width = found["source"].shape[2:]
    for name, picture in found.items():
        if picture.shape[2:] != (height, width):
            raise ValueError(
                f"{name} is {picture.shape[3]}x{picture.shape[2]}, source {width}x{height}: scale "
                "one of them (Upscale Image), or align it with Change Mask"
            )
    if mask is not None:
        require_finite_mask(mask)
        flat = mask_batch(mask).float().clamp(0, 1)
        found["mask"] = masks.resized(flat, height, width).to(found["source"])
    return dict(zip(found, same_batch(**found), strict=True))


def names_for(text: str, count: int) -> list[str]:
    """Names separated by commas, or "edit 1" and so on.

    Raises:
        ValueError: another number of names than of pictures.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names and len(names) != count:
        raise ValueError(
            f"names has {len(names)} names for {count} edits: write one for each, separated by "
            "commas, or none"
        )
    return names or [f"edit {number}" for number in range(1, count + 1)]
