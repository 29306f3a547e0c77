"""What the connected model is and what it can do, asked of the model and never guessed."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher


def name(model: ModelPatcher) -> str:
    """The family as ComfyUI detected it, e.g. "SD3" or "Flux"."""
    return type(model.model.model_config).__name__


def base(family: str) -> str:
    """The family that another one's layers are those of: "Flux" for "FluxInpaint"."""
    plain = family.split("_")[0]
    return _bases.get(plain, plain)


_bases = {"FluxInpaint": "Flux", "FluxSchnell": "Flux"}


def require_flow(model: ModelPatcher) -> None:
    """Refuse models whose prediction is not a rectified-flow velocity.

    Raises:
        ValueError: for epsilon-, v- and x0-prediction models, for image-to-image flows and for
            models with scaled noise (HiDream-O1).
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"model is {name(model)}, which does not predict a flow velocity: load a flow model "
            "such as SD3, SD3.5, Flux, Qwen-Image, Z-Image or Wan"
        )
    image_to_image = isinstance(sampling, comfy.model_sampling.IMG_TO_IMG_FLOW)
    if image_to_image or getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise ValueError(
            f"model is {name(model)}, a flow model that does not start from plain noise, which "
            "Pinpoint's edits need: load another, such as SD3, Flux, Qwen-Image or Wan"
        )


def require_noise_prediction(model: ModelPatcher) -> None:
    """Refuse models that do not start from noise added to the picture and predict it.

    Raises:
        ValueError: for flow models, and for others than epsilon, v and x0 prediction.
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"model is {name(model)}, a flow model, which needs no null-text embeddings: use "
            "Invert instead"
        )
    noise_added = isinstance(sampling, comfy.model_sampling.EPS)
    if not noise_added or isinstance(sampling, comfy.model_sampling.IMG_TO_IMG):
        raise ValueError(
            f"model is {name(model)}, which does not predict noise: load one such as SD1.5, SD2 or "
            "SDXL"
        )


def has_embedded_guidance(model: ModelPatcher) -> bool:
    """Whether guidance is distilled into the model and given to it as a number (Flux.1-dev)."""
    return bool(model.model.model_config.unet_config.get("guidance_embed", False))


def progress(sampling: Any, sigma: float) -> float:
    """How far a noise level lies from the first (0) to the picture (1), as start and end count it.

    Args:
        sampling: a model's `model_sampling`.
    """
    low, high = 0.0, 1.0
    # As fine as float32 tells noise levels apart.
    for _ in range(24):
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2
