"""ComfyUI's own way to the numbers that the pack's are held against; needs `inprocess.start`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tiny

Conditioning = list[Any]


def call(class_type: str, **inputs: Any) -> tuple[Any, ...]:
    """Run one node as the executor does, and return its outputs."""
    # To a type checker, a plain import of `nodes` would be of our own.
    nodes: Any = importlib.import_module("nodes")
    node = nodes.NODE_CLASS_MAPPINGS[class_type]
    with torch.inference_mode():
        result = getattr(node(), node.FUNCTION)(**inputs)
    return getattr(result, "result", result)


def conditioning(
    seed: int, tokens: int = 12, width: int = tiny.text_width, **extras: Any
) -> Conditioning:
    """A prompt's random stand-in, as a text encoder would give it for the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, tiny.pooled_width, generator=generator)
    text = torch.randn(1, tokens, width, generator=generator)
    return [[text, {"pooled_output": pooled, **extras}]]


def with_values(prompt: Conditioning, **values: Any) -> Conditioning:
    """A prompt with more entries in its dictionaries, as ComfyUI's nodes set them."""
    return [[text, {**entries, **values}] for text, entries in prompt]


class Demo(NamedTuple):
    """The demo checkpoint, as the stock loader gives it."""

    model: Any
    clip: Any
    vae: Any

    def prompt(self, text: str) -> Conditioning:
        """The conditioning of a text."""
        return call("CLIPTextEncode", clip=self.clip, text=text)[0]


class _Probe:
    """Quacks like a sampler, and looks at the model instead of sampling."""

    def __init__(self, look: Callable[[Any, dict[str, Any]], Any]):
        self.look = look

    def sample(self, guider: Any, _sigmas: Tensor, extra_args: dict, *args: Any) -> Tensor:
        """ComfyUI's sampler interface; returns the latent as it came."""
        _callback, _noise, latent_image, *_ = args
        self.seen = self.look(guider, extra_args)
        return latent_image


def inside(guider: Any, like: Tensor, look: Callable[[Any, dict[str, Any]], Any]) -> Any:
    """Call `look(guider, extra_args)` where a sampler would run, and return what it returns.

    `like` has the shape of the latents that the guider is going to be asked about.
    """
    probe = _Probe(look)
    empty, sigmas = torch.zeros_like(like), torch.tensor([1.0, 0.0])
    with torch.inference_mode():
        guider.sample(empty, empty, probe, sigmas, seed=0, disable_pbar=True)
    return probe.seen


def velocity(
    model: Any,
    positive: Conditioning,
    negative: Conditioning | None,
    cfg: float,
    x: Tensor,
    sigma: float,
) -> Tensor:
    """Guided velocity of one prompt at one latent, by ComfyUI's CFG guider."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(
        {"positive": positive} | ({} if negative is None else {"negative": negative})
    )
    guider.set_cfg(cfg)

    def look(guider: Any, extra_args: dict[str, Any]) -> Tensor:
        denoised = guider(x, x.new_full((len(x),), sigma), **extra_args)
        return (x - denoised) / sigma

    return inside(guider, x, look)
