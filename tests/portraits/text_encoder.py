"""A CLIP-L made from a seed: frozen random embeddings behind layers that pass their input through.

ComfyUI has no smaller stock text encoder, and 247 MB are too many to ship, so every machine makes
the same file when it first needs one. The numbers come from the raw bits of numpy's PCG64, whose
stream is fixed for good, and not from its distributions, whose streams may change.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

width, vocabulary, positions, depth = 768, 49408, 77, 12
token_deviation, position_deviation = 0.7, 0.35


def _uniform(bits: np.random.PCG64, shape: tuple[int, ...], deviation: float) -> Tensor:
    """Uniform numbers with the given standard deviation, rounded to fp16."""
    count = int(np.prod(shape))
    raw = bits.random_raw((count + 3) // 4).astype("<u8").view("<u2")[:count]
    centred = (raw.astype(np.float32) - 32767.5) * np.float32(deviation * 12**0.5 / 65536)
    return torch.from_numpy(centred.astype(np.float16).reshape(shape))


def embeddings(seed: int = 20261121) -> tuple[Tensor, Tensor]:
    """Token (49408, 768) and position (77, 768) embeddings, fp16."""
    bits = np.random.PCG64(seed)
    tokens = _uniform(bits, (vocabulary, width), token_deviation)
    return tokens, _uniform(bits, (positions, width), position_deviation)


def state_dict() -> dict[str, Tensor]:
    """CLIP-L in the key names that ComfyUI's loaders know, `text_model.*`, fp16."""
    tokens, places = embeddings()
    tensors = {
        "text_model.embeddings.token_embedding.weight": tokens,
        "text_model.embeddings.position_embedding.weight": places,
    }
    norm = {"weight": torch.ones(width).half(), "bias": torch.zeros(width).half()}
    linears = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for layer in range(depth):
        prefix = f"text_model.encoder.layers.{layer}."
        for name, value in norm.items():
            tensors[f"{prefix}layer_norm1.{name}"] = value.clone()
            tensors[f"{prefix}layer_norm2.{name}"] = value.clone()
        for name, shape in linears.items():
            tensors[f"{prefix}{name}.weight"] = torch.zeros(shape).half()
            tensors[f"{prefix}{name}.bias"] = torch.zeros(shape[0]).half()
    for name, value in norm.items():
        tensors[f"text_model.final_layer_norm.{name}"] = value
    return tensors
