"""Networks that judge edits: both towers of a CLIP, a DINOv2, and any encoder of identities."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor

from . import progress

_towers = ("clip_l", "clip_h", "clip_g")
least_agreement = 0.05
"""Pictures and words of one CLIP are nearer to each other than this, whatever they show."""


def embedding(encoder: ClipVisionModel, name: str, image: Tensor) -> Tensor:
    """What an encoder makes of the middle of a picture: (1, 3, H, W) -> (C,).

    Raises:
        ValueError: it gives no embedding of the whole picture, or one that is not finite.
    """
    found = getattr(encoder.encode_image(image.movedim(1, -1)), "image_embeds", None)
    if found is None or found.ndim != 2:
        raise ValueError(
            f"{name} gives no embedding of the whole picture: use a CLIP or DINOv2 from Load Image "
            "Encoder"
        )
    if not found.isfinite().all():
        raise ValueError(
            f"{name} gives values that are not finite: its file is damaged, or its precision too "
            "low"
        )
    return found[0].float()


def keys(encoder: ClipVisionModel, image: Tensor) -> Tensor:
    """Keys (T, C) of a DINOv2's last layer, of all of a picture (1, 3, H, W), made square.

    Raises:
        ValueError: it is no DINOv2.
    """
    if encoder.model_type != "dinov2":
        raise ValueError(
            f"dino is {encoder.model_type}: use a DINOv2 from Load Image Encoder, whose keys give "
            "the structure distance"
        )
    seen: list[Tensor] = []
    layer = encoder.model.encoder.layer[-1].attention.attention.key
    hook = layer.register_forward_hook(lambda _module, _args, out: seen.append(out))
    try:
        encoder.encode_image(image.movedim(1, -1), crop=False)
    finally:
        hook.remove()
    return seen[0][0].float().to(image.device)


class Words:
    """A CLIP's text tower, for comparisons with pictures.

    Most files of text encoders have no text projection, since no image model needs that of
    CLIP-L: without it, words and pictures do not meet.

    Raises:
        ValueError: no tower has as many channels as the pictures' embedding, or its projection is
            missing.
    """

    def __init__(self, clip: CLIP, channels: int):
        found = {name: getattr(clip.cond_stage_model, name, None) for name in _towers}
        towers = {name: tower for name, tower in found.items() if tower is not None}
        widths = {name: _projection(tower) for name, tower in towers.items()}
        fitting = [n for n, w in widths.items() if w is not None and w.shape[0] == channels]
        if not fitting:
            had = ", ".join(towers) or "no CLIP"
            raise ValueError(
                f"clip has {had}, none of which gives the {channels} channels of clip_vision: load "
                "both from one CLIP, as openai/clip-vit-large-patch14's model.safetensors in "
                "models/text_encoders and in models/clip_vision"
            )
        self.clip, self.name = clip, fitting[0]
        self.tower = towers[self.name]
        _require_trained(_projection(self.tower), self.name)

    def embedding(self, text: str, input_name: str) -> Tensor:
        """(C,), projected to where pictures are, of what a CLIP reads at once.

        Raises:
            ValueError: values that are not finite.
        """
        tokens = self.clip.tokenize(text)
        parts = tokens[self.name.removeprefix("clip_")]
        if len(parts) > 1:
            progress.warn(
                f"{input_name} is longer than the 77 tokens that CLIP reads at once, so its end "
                "does not count: shorten it"
            )
        self.clip.load_model(tokens)
        model, device = self.clip.cond_stage_model, self.clip.patcher.load_device
        model.reset_clip_options()
        model.set_clip_options({"projected_pooled": True, "execution_device": device})
        try:
            with comfy.model_management.cuda_device_context(device):
                # Weights of words belong to image models.
                _, pooled, *_ = self.tower.encode([[token for token, _ in parts[0]]])
        finally:
            model.reset_clip_options()
        if not pooled.isfinite().all():
            raise ValueError(
                "clip gives values that are not finite: its file is damaged, or has no text "
                "projection"
            )
        return pooled[0].float().cpu()


def _projection(tower: Any) -> Tensor | None:
    return getattr(getattr(tower.transformer, "text_projection", None), "weight", None)


def _require_trained(weight: Tensor | None, name: str) -> None:
    """Refuse what ComfyUI leaves in place of a projection that a file does not have."""
    assert weight is not None, "chosen by its shape"
    values = weight.float()
    same = values.shape[0] == values.shape[1] and torch.equal(values.cpu(), torch.eye(len(values)))
    norms = values.norm(dim=1)
    if same or not values.isfinite().all() or not norms.all() or norms.max() > 1000 * norms.min():
        raise ValueError(
            f"clip has {name} without its text projection, as files for image models do: load one "
            "that has it, as openai/clip-vit-large-patch14's model.safetensors, with Load CLIP"
        )


def warn_of_strangers(similarity: float | None) -> None:
    """Say when words and pictures do not meet, as those of two CLIPs do not."""
    if similarity is not None and abs(similarity) < least_agreement:
        progress.warn(
            f"clip and clip_vision agree by {similarity:.3f} only, as towers of different CLIPs "
            "or without text projection do: load both from one CLIP"
        )
