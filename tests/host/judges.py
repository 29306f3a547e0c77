"""Small judges with fixed random weights, beside the libraries that define them.

Needs `inprocess.start`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from portraits.dataset import edits, pictures

from .photographs import astronaut, through_jpeg

side, patch, width = 56, 14, 128


class Clip(NamedTuple):
    """Both towers of one CLIP, as ComfyUI loads them, and as transformers has them."""

    text: Any
    vision: Any
    reference: Any


def clip(*, projection: bool = True) -> Clip:
    """A tiny CLIP; without its text projection as files for image models are."""
    import comfy.sd
    from transformers import CLIPConfig, CLIPModel

    size = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "hidden_act": "quick_gelu",
    }
    text = {**size, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {**size, "image_size": side, "patch_size": patch}
    torch.manual_seed(3)
    with torch.random.fork_rng():
        reference = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
        ).eval()
    weights = {name: value.clone() for name, value in reference.state_dict().items()}
    if not projection:
        weights["text_projection.weight"] = torch.eye(width)
    options = {"model_config": {key: size[key] for key in list(size)[:4]}}
    loaded = comfy.sd.load_text_encoder_state_dicts([weights], model_options=options)
    config = {**size, "image_size": side, "patch_size": patch, "projection_dim": width}
    seen = _encoder({**config, "model_type": "clip_vision_model", "num_channels": 3}, weights)
    return Clip(loaded, seen, reference)


def dino() -> tuple[Any, Any]:
    """A tiny DINOv2 as ComfyUI has it, and as transformers has it."""
    from transformers import Dinov2Config, Dinov2Model

    size = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
    }
    with torch.random.fork_rng():
        torch.manual_seed(4)
        # The scale is that of trained layers, so that tokens differ.
        reference = Dinov2Model(Dinov2Config(**size, initializer_range=0.1)).eval()
    config = {
        **size,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "layer_norm_eps": 1e-6,
        "model_type": "dinov2",
        "num_channels": 3,
        "use_swiglu_ffn": False,
    }
    # Files have the names that transformers gave these before its fifth version.
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    names |= {"o_proj": "output.dense"}
    weights = {
        re.sub(r"[qkvo]_proj", lambda match: names[match[0]], name): value
        for name, value in reference.state_dict().items()
    }
    return _encoder(config, weights), reference


def _encoder(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from comfy.clip_vision import ClipVisionModel

    encoder = ClipVisionModel(config)
    missing, _ = encoder.load_sd(weights)
    assert not missing
    return encoder


def random_pictures(side: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two pictures (1, 3, H, W) and a region (1, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 1, 3, side, side + 8, generator=generator)
    region = F.interpolate(torch.rand(1, 1, 4, 4, generator=generator), a.shape[2:])[:, 0]
    return a, (0.7 * a + 0.3 * b), (region > 0.5).float()


def drawn_pictures() -> tuple[Tensor, Tensor, Tensor]:
    """A portrait, its true edit, and a region of half of that."""
    edit = edits("tests", 0, 9)[-1]
    a, b = (pictures([person]).float() / 255 for person in (edit.source, edit.target))
    region = torch.zeros(1, 128, 128)
    region[:, :40, 30:100] = 1
    return a, b, region


def photographs() -> tuple[Tensor, Tensor, Tensor]:
    """A photograph, what a JPEG keeps of it in another light, and a region around the face."""
    image = astronaut(128)
    other = through_jpeg((image * 0.9 + 0.03).clamp(0, 1))
    region = torch.zeros(1, 128, 128)
    region[:, 5:75, 30:90] = 1
    return image.movedim(-1, 1), other.movedim(-1, 1), region


def backbone(net: str, folder: Path) -> dict[str, Tensor]:
    """Write random weights as torchvision's file of a backbone of LPIPS, and return them."""
    import torchvision

    names = {
        "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
        "vgg": ("vgg16", "vgg16-397923af.pth"),
        "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
    }
    kind, file_name = names[net]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(torchvision.models, kind)(weights=None)
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("features.")}
    torch.save(weights, folder / file_name)
    return weights
