"""Samplings with Prompt-to-Prompt Guider for tests, and ComfyUI's own beside them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import stock
from .inversions import euler
from .maps import pair_guider
from .tapping import WORDS, Family

GUIDANCE = 2.0


def prompt(family: Family, seed: int) -> stock.Conditioning:
    """With the guidance that the guider gives as a number."""
    return stock.with_values(family.prompt(seed), guidance=GUIDANCE)


def schedule(model: Any, steps: int = 5) -> Tensor:
    """A whole one, by ComfyUI."""
    return stock.call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[
        0
    ]


def sampled(
    guider: Any, latent: Tensor, sampler: Any = None, noise: Any = None, sigmas: Any = None
) -> Tensor:
    """What SamplerCustomAdvanced makes of a latent, by Euler and a whole schedule if not told."""
    model = guider.model_patcher
    return stock.call(
        "SamplerCustomAdvanced",
        noise=stock.call("RandomNoise", noise_seed=3)[0] if noise is None else noise,
        guider=guider,
        sampler=euler() if sampler is None else sampler,
        sigmas=schedule(model) if sigmas is None else sigmas,
        latent_image={"samples": latent},
    )[0]["samples"]


def stock_guider(model: Any, family: Family, seed: int) -> Any:
    """ComfyUI's, for one prompt."""
    if family.model == "flux":
        return stock.call("BasicGuider", model=model, conditioning=prompt(family, seed))[0]
    prompts = dict(positive=prompt(family, seed), negative=family.prompt(9))
    return stock.call("CFGGuider", model=model, **prompts, cfg=GUIDANCE)[0]


def guider_of(model: Any, family: Family, source: int = 1, target: int = 2, **given: Any) -> Any:
    """A Prompt-to-Prompt Guider for prompts by their seeds."""
    guidance = dict(source_guidance=GUIDANCE, target_guidance=GUIDANCE)
    prompts = (family.prompt(source), family.prompt(target), family.prompt(9))
    return pair_guider(model, *prompts, **{**guidance, **given})


def trajectory_of(pack: ModuleType, model: Any, latent: Tensor) -> Any:
    """Any way from a noise to a latent, along a model's schedule."""
    host, sigmas = pack.nodes.host, schedule(model).tolist()
    clean = model.model.process_latent_in(latent)
    sampling = model.get_model_object("model_sampling")
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    levels = [torch.tensor(sigma) for sigma in sigmas]
    states = [sampling.noise_scaling(level, noise.clone(), clean) for level in levels]
    made = (sigmas, torch.stack(states), noise, host.families.name(model))
    return host.inversion.Trajectory(*made)


def noise_of(pack: ModuleType, way: Any) -> Any:
    """The NOISE that leads along a trajectory."""
    return pack.nodes.host.inversion.InvertedNoise(way.noise)


def words_at(*places: int) -> tuple[Tensor, Tensor]:
    """Words to blend by, the same of both prompts."""
    column = torch.zeros(WORDS)
    column[list(places)] = 1
    return column, column
