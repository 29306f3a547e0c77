"""An identity for the tiny SD3 with its CLIP-L, and what it does there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import stock, tiny_clip
from .edits import picture_latent
from .foreign import lora_weights

LORA = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
"""The weight that it changes."""


def ann(pack: ModuleType) -> Any:
    """With a word and a change of the model."""
    lora = {key: t for key, t in lora_weights().items() if key.startswith(LORA)}
    lora[f"{LORA}.alpha"] = torch.tensor(4.0)
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    recipe = {"steps": "10", "prompt": "a photo of <ann> person"}
    return pack.nodes.host.identity.Identity("ann", "person", "SD3", {"l": vectors}, lora, recipe)


def apply(model: Any, identity: Any, clip: Any = None, **inputs: Any) -> tuple[Any, Any]:
    """Model and text encoder that know an identity."""
    settings = {"strength": 1.0, "name": "", **inputs}
    clip = tiny_clip.clip() if clip is None else clip
    return stock.call(
        "PinpointApplyIdentity", model=model, clip=clip, identity=identity, **settings
    )


def encoded(clip: Any, text: str) -> stock.Conditioning:
    """A prompt as ComfyUI's own node encodes it."""
    return stock.call("CLIPTextEncode", clip=clip, text=text)[0]


def velocity(model: Any, clip: Any, text: str) -> Tensor:
    """The velocity of a prompt."""
    return stock.velocity(model, encoded(clip, text), None, 1.0, picture_latent(), 0.6)
