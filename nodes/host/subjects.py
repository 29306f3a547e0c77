"""Subjects: reference pictures as image encoders see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.clip_model
import torch
from comfy.clip_vision import ClipVisionModel
from torch import Tensor

from ...kernels import crops
from . import arguments

BACKGROUNDS = ("remove", "keep")
FITS = ("pad", "crop")
COMBINATIONS = ("concatenate", "average")

_with_class_token = ("clip_vision_model", "dinov2")
_readable = (*_with_class_token, "siglip_vision_model", "siglip2_vision_model")
_usual_patch, _usual_size = 14, 224
"""Of encoders whose configuration does not tell."""


class EncoderKind(NamedTuple):
    """What an image encoder is by its sizes; several trainings of one kind cannot be told apart."""

    model_type: str
    hidden_size: int
    image_size: int
    patch_size: int

    def __str__(self) -> str:
        return (
            f"{self.model_type} {self.hidden_size} wide, of {self.image_size} pixels in patches of "
            f"{self.patch_size}"
        )


EncoderKinds = tuple[EncoderKind, EncoderKind]
"""Of the low-level and of the high-level one."""


@dataclass(frozen=True)
class Subject:
    """A subject as image encoders see it; R reference pictures.

    Attributes:
        low: (R, P, W), patch features of the low-level encoder, without its class token.
        high: (R, C), the high-level encoder's embedding of the whole picture.
        hidden: (R, T, H), the high-level encoder's penultimate hidden states, class token first.
        blank: (1, T, H), the same of a picture of the encoder's mean colour.
        encoders: that saw it; None if not known.
        high_input: of Encode Subject, to which the high-level encoder is connected.
    """

    low: Tensor
    high: Tensor
    hidden: Tensor
    blank: Tensor
    encoders: EncoderKinds | None = None
    high_input: str = "high_encoder"


@dataclass(frozen=True)
class Framing:
    """How references are cut.

    Attributes:
        background: one of BACKGROUNDS; with a mask, what happens to the picture outside it.
        margin: around the mask's box, in parts of its longer side.
        fit: one of FITS, how a square is made.
    """

    background: str = "remove"
    margin: float = 0.1
    fit: str = "pad"


@dataclass(frozen=True)
class _Encoder:
    """An encoder and the input that it came from."""

    model: ClipVisionModel
    input_name: str

    @property
    def color(self) -> crops.Color:
        """What it takes for nothing: 0 after its normalisation."""
        return self.model.image_mean

    def see(self, square: Tensor) -> Any:
        """ComfyUI's encoding of one picture (S, S, 3).

        Raises:
            ValueError: it has no embedding, or one that is not finite.
        """
        output = self.model.encode_image(square[None])
        embedding = getattr(output, "image_embeds", None)
        if embedding is None:
            raise ValueError(
                f"{self.input_name} gives no image embedding: use a CLIP or DINOv2 from Load Image "
                "Encoder"
            )
        if not embedding.isfinite().all():
            raise ValueError(
                f"{self.input_name} gives values that are not finite: its file is damaged, or its "
                "precision too low"
            )
        return output

    def patches(self, output: Any) -> Tensor:
        """Features of the patches (1, P, W), without the class token."""
        if self.model.model_type == "dinov2":
            return output.last_hidden_state[:, 1:]
        states: Tensor = output.penultimate_hidden_states
        return states[:, 1:] if self.model.model_type in _with_class_token else states

    def seen(self, square: Tensor) -> Tensor:
        """The picture at its own size, as it reads it before its normalisation: (1, S, S, 3)."""
        size = self.model.image_size if self.model.image_size > 0 else _usual_size
        read = comfy.clip_model.clip_preprocess(square[None], size, [0.0] * 3, [1.0] * 3)
        return read.movedim(1, -1)


@torch.no_grad()
def encoded(
    image: Tensor,
    low_encoder: ClipVisionModel | None,
    high_encoder: ClipVisionModel | None = None,
    mask: Tensor | None = None,
    framing: Framing | None = None,
    combine: str = "concatenate",
) -> tuple[Subject, Tensor]:
    """Encode references.

    Args:
        image: (R, H, W, 1, 3 or 4) in [0, 1]; transparent places have no picture.
        low_encoder: gives patch features.
        high_encoder: gives the embedding; None for the low one.
        mask: (R or 1, H, W), 1 = subject.
        framing: how references are cut; None for its defaults.
        combine: one of COMBINATIONS; "average" makes one reference of all.

    Returns:
        The subject, and (R, S, S, 3) what the low-level encoder reads.

    Raises:
        ValueError: an input that cannot be used, see `_require_pictures` and `_require_mask`.
    """
    low, high = _encoders(low_encoder, high_encoder)
    *gathered, pictures = _features(image, low, high, mask, framing or Framing())
    if combine == "average":
        gathered = [tensor.mean(0, keepdim=True) for tensor in gathered]
    # To the encoder, its mean colour is zero: so IP-Adapter Plus was trained without a picture.
    side = high.model.image_size
    blank = torch.tensor(high.color).expand(side, side, 3)
    gathered.append(_whole(high, high.see(blank))[1].float())
    kept = dict(zip(("low", "high", "hidden", "blank"), map(_unbound, gathered), strict=True))
    kinds = kind_of(low.model), kind_of(high.model)
    return Subject(**kept, encoders=kinds, high_input=high.input_name), pictures


@torch.no_grad()
def features(
    image: Tensor, low_encoder: ClipVisionModel, high_encoder: ClipVisionModel, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`Subject.low` and `Subject.high` of references; see `encoded`."""
    encoders = _encoders(low_encoder, high_encoder)
    patches, whole, *_ = _features(image, *encoders, mask, Framing())
    return _unbound(patches), _unbound(whole)


def _features(
    image: Tensor, low: _Encoder, high: _Encoder, mask: Tensor | None, framing: Framing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Subject`'s low, high and hidden, and what the low-level encoder reads; see `encoded`."""
    _require_pictures(image)
    if mask is not None:
        mask = arguments.mask_batch(mask).float()
        _require_mask(mask, image)
    # One at a time: crops differ in size, and a reference must not depend on its batch.
    parts, pictures = [], []
    for index in range(len(image)):
        chosen = None if mask is None else mask[min(index, len(mask) - 1)]
        square = _square(image[index], chosen, framing, low)
        pictures.append(low.seen(square))
        seen_low = low.see(square)
        seen_high = seen_low
        if high.model is not low.model:
            seen_high = high.see(_square(image[index], chosen, framing, high))
        parts.append((low.patches(seen_low), *_whole(high, seen_high)))
    patches, wholes, states = (torch.cat(tensors).float() for tensors in zip(*parts, strict=True))
    return patches, wholes, states, torch.cat(pictures)


def kind_of(encoder: ClipVisionModel) -> EncoderKind:
    """What adapters remember of an encoder that they were trained with."""
    config = encoder.config
    patch = config.get("patch_size", _usual_patch)
    return EncoderKind(encoder.model_type, config["hidden_size"], encoder.image_size, patch)


def _encoders(
    low: ClipVisionModel | None, high: ClipVisionModel | None
) -> tuple[_Encoder, _Encoder]:
    checked = _encoder(low, "low_encoder")
    return checked, checked if high is None else _encoder(high, "high_encoder")


def _encoder(model: ClipVisionModel | None, input_name: str) -> _Encoder:
    if model is None:
        raise ValueError(
            f"{input_name} is empty, as what loaded it has no image encoder: use Load Image Encoder"
        )
    kind = getattr(model, "model_type", type(model).__name__)
    if kind not in _readable:
        raise ValueError(
            f"{input_name} is {kind}, which Pinpoint cannot read: use a CLIP or DINOv2 from Load "
            "Image Encoder"
        )
    return _Encoder(model, input_name)


def _require_pictures(image: Tensor) -> None:
    """Refuse no pictures, channels that are no colours, and values that are not finite."""
    if not len(image):
        raise ValueError("image has no pictures: connect at least one reference")
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image has {image.shape[-1]} channels: use a grey, RGB or RGBA picture")
    if not image.isfinite().all():
        raise ValueError("image holds values that are not finite: check where it comes from")


def _require_mask(mask: Tensor, image: Tensor) -> None:
    """Refuse masks of other pictures, without any subject, or with values that are not finite."""
    arguments.require_finite_mask(mask)
    if len(mask) not in (1, len(image)):
        raise ValueError(
            f"mask has {len(mask)} images, the image {len(image)}: use one mask, or one for each"
        )
    for index, one in enumerate(mask):
        # Load Image gives an empty mask of 64x64 where a picture has none.
        if crops.box_around(one, 0) is None:
            raise ValueError(
                f"mask {index + 1} marks no subject, as no value in it reaches 0.5: paint the "
                "subject, or disconnect it"
            )
    if mask.shape[1:] != image.shape[1:3]:
        (height, width), (rows, columns) = mask.shape[1:], image.shape[1:3]
        raise ValueError(
            f"mask is {width}x{height}, the image {columns}x{rows}: use a mask of the same picture"
        )


def _square(picture: Tensor, mask: Tensor | None, framing: Framing, encoder: _Encoder) -> Tensor:
    """What an encoder is shown of one reference, (S, S, 3).

    Raises:
        ValueError: S is less than one of the encoder's patches.
    """
    shown = crops.on_color(picture.float().clamp(0, 1), encoder.color)
    if mask is not None:
        mask = mask.to(shown).clamp(0, 1)
        if framing.background == "remove":
            shown = crops.over_color(shown, mask, encoder.color)
        box = crops.box_around(mask, framing.margin)
        assert box is not None, "checked by _require_mask"
        shown = shown[box]
    if framing.fit == "pad":
        shown = crops.padded_square(shown, encoder.color)
    else:
        shown = crops.centre_square(shown)
    patch = encoder.model.config.get("patch_size", _usual_patch)
    if len(shown) < patch:
        raise ValueError(
            f"image shows the subject in {len(shown)}x{len(shown)} pixels, less than a patch of "
            f"{patch} of {encoder.input_name}: use a larger picture or mask"
        )
    # Equal pictures that lie otherwise in memory are rounded otherwise.
    return shown.contiguous()


def _whole(encoder: _Encoder, output: Any) -> tuple[Tensor, Tensor]:
    """The embedding of a whole picture (1, C), and hidden states (1, T, H)."""
    if output.image_embeds.ndim != 2:
        raise ValueError(
            f"{encoder.input_name} is {encoder.model.model_type}, which has an embedding for each "
            "patch and none of the whole picture: use a CLIP or DINOv2 as high_encoder"
        )
    return output.image_embeds, output.penultimate_hidden_states


def _unbound(tensor: Tensor) -> Tensor:
    """A copy that gradients can be taken behind, which those of an executor's nodes are not."""
    with torch.inference_mode(False):
        return tensor.clone()
