"""A tiny CLIP with fixed random weights, whose text fits the tiny models.

Its pooled prompt is as wide as the text, so it does for models that read none: sd3_bare and wan.

Needs `inprocess.start`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import tiny

CONFIG = {
    "hidden_size": tiny.text_width,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
}


@cache
def clip() -> Any:
    """A CLIP as ComfyUI's loader makes it from a file of CLIP-L, but for its sizes."""
    made = _made()
    # As its loaders do, so that it can be loaded a second time.
    made.patcher.cached_patcher_init = (_patcher, ())
    return made


def _made() -> Any:
    import comfy.sd

    options = {"model_config": CONFIG}
    return comfy.sd.load_text_encoder_state_dicts([_weights()], model_options=options)


def _patcher(disable_dynamic: bool = False) -> Any:  # noqa: ARG001
    return _made().patcher


def _weights() -> dict[str, Tensor]:
    from comfy.clip_model import CLIPTextModel
    from comfy.ops import disable_weight_init

    config = {
        **CONFIG,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_act": "quick_gelu",
        "eos_token_id": 49407,
    }
    with torch.device("meta"):
        model = CLIPTextModel(config, torch.float32, None, disable_weight_init)
    return tiny.drawn(model, seed=6)
