"""Prompt-to-Prompt in real model calls, against whole attention maps that a test computes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import patcher_state
from host.inversions import Calls
from host.maps import Control, pair_guider
from host.tapping import FAMILIES, WORDS, Family

TinyModel = Callable[[str], Any]

UNETS = ("SD1.5", "SDXL")
JOINT = ("SD3", "Flux", "Z-Image", "Qwen-Image", "Flux.2")
families = pytest.mark.parametrize("name", [*UNETS, *JOINT, "Wan"])
some = pytest.mark.parametrize("name", ["SD1.5", "SDXL", "SD3", "Flux"])
SIGMA = 0.7


def swap(first: int = 3) -> Tensor:
    """Words 3 and 4 change places, word 7 is new."""
    mapping = torch.eye(WORDS)
    mapping[:, [first, first + 1]] = mapping[:, [first + 1, first]]
    mapping[:, 7] = 0
    return mapping


def held_on(pack: ModuleType, model: Any, latent: Tensor, sigma: float = SIGMA) -> Any:
    """A trajectory that is at a latent at a noise level."""
    host = pack.nodes.host
    latents = torch.stack([latent, latent, latent * 0.5])
    return host.inversion.Trajectory(
        [max(1.0, 2 * sigma), sigma, 0.0], latents, latent, host.families.name(model)
    )


def prompts_of(family: Family) -> tuple[stock.Conditioning, stock.Conditioning]:
    """The target and the source, with the guidance number that the guider gives."""
    target, source = (stock.with_values(family.prompt(seed), guidance=1.0) for seed in (2, 1))
    return target, source


def asked(
    pack: ModuleType, model: Any, family: Family, x: tuple[Tensor, Tensor], **guidance: Any
) -> Tensor:
    """The target's velocity where a sampler asks for it, the source held at a latent."""
    way = held_on(pack, model, x[1])
    given = dict(trajectory=way, **guidance)
    target, source = prompts_of(family)
    guider = pair_guider(model, source, target, **given)

    def look(guider: Any, extra_args: dict[str, Any]) -> Tensor:
        denoised = guider(x[0], x[0].new_full((len(x[0]),), SIGMA), **extra_args)
        return (x[0] - denoised) / SIGMA

    # The sampler's own latent is the shape's only.
    return stock.inside(guider, x[0], look)


@families
@pytest.mark.parametrize("batch", [1, 2])
def test_words_look_where_the_sources_look(
    pack: ModuleType, tiny_model: TinyModel, name: str, batch: int
) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(batch, 4), family.latent(batch, 5))
    weight = torch.linspace(0.5, 1.5, WORDS)
    control = Control(pack, family, self_until=0.0, mapping=swap(), weight=weight)
    found = asked(pack, control.on(model), family, x)
    expected = control.written_out(model, prompts_of(family), x, SIGMA)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = asked(pack, Control(pack, family, 0.0, 0.0).on(model), family, x)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*UNETS, "Wan"])
def test_the_picture_looks_at_itself_as_the_source_does(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    prompts = prompts_of(family)
    for cross in (0.0, 1.0):
        control = Control(pack, family, cross_until=cross, mapping=swap())
        found = asked(pack, control.on(model), family, x)
        expected = control.written_out(model, prompts, x, SIGMA)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@some
def test_control_can_be_off(pack: ModuleType, tiny_model: TinyModel, name: str) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    found = asked(pack, Control(pack, family, 0.0, 0.0).on(model), family, x)
    plain = stock.velocity(model, prompts_of(family)[0], None, 1.0, x[0], SIGMA)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-4)
    same = asked(pack, model, family, x)
    assert torch.equal(found, same)
