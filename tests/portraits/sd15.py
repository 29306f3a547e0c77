"""The SD1.5 demo model, built as ComfyUI's loaders would: they take no UNet of its width."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from . import weights
from .formats import sd15_settings


def load_model(*, disable_dynamic: bool = False) -> Any:  # noqa: ARG001
    """A ModelPatcher; like a stock loader's, it can make itself again for a training copy."""
    from comfy import model_management, model_patcher, supported_models

    config = supported_models.SD15(dict(sd15_settings))
    config.unet_config["num_heads"] = sd15_settings["num_heads"]
    config.set_inference_dtype(torch.float32, None)
    tensors = load_file(weights.network_files["sd15"])
    model = config.get_model(tensors)
    model.load_model_weights(tensors, "")
    patcher = model_patcher.CoreModelPatcher(
        model,
        load_device=model_management.get_torch_device(),
        offload_device=model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (load_model, ())
    return patcher
