"""Prompt-to-Prompt in real model calls, against whole attention maps that a test computes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import patcher_state
from host.inversions import Values, injecting
from host.maps import SIGMA, UNETS, Control, asked, prompts_of, swap
from host.tapping import FAMILIES, WORDS

TinyModel = Callable[[str], Any]

JOINT = ("SD3", "Flux", "Z-Image", "Qwen-Image", "Flux.2")
families = pytest.mark.parametrize("name", [*UNETS, *JOINT, "Wan"])
some = pytest.mark.parametrize("name", ["SD1.5", "SDXL", "SD3", "Flux"])


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


@pytest.mark.parametrize("name", ["SD3", "Flux", "Qwen-Image"])
def test_in_joint_attention_the_picture_has_the_sources_queries_and_keys(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(2, 4), family.latent(2, 5))
    control = Control(pack, family, cross_until=0.0)
    found = asked(pack, control.on(model), family, x)
    expected = control.with_the_sources_looks(model, prompts_of(family), x, SIGMA)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = stock.velocity(model, prompts_of(family)[0], None, 1.0, x[0], SIGMA)
    assert (found - plain).abs().max() > 1e-3


# With the values of the source


@pytest.mark.parametrize("name", UNETS)
def test_values_of_a_unets_source_can_be_injected(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    """By Inject Values without a trajectory; its self-attentions see the source's values."""
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    # A tiny SDXL has coarser grids than its latent.
    mask = torch.linspace(0, 1, 63).view(1, 7, 9) if name == "SD1.5" else None
    weight = torch.ones(()) if mask is None else 1 - mask.view(1, 1, -1, 1)
    target, source = prompts_of(family)
    theirs = Values(model).read(source, x[1], SIGMA)

    def blend(number: int, values: Tensor) -> Tensor:
        if not family.seen[number].endswith("self"):
            return values
        return values + weight * (theirs[number] - values)

    changed = Values(model).changed(blend)
    expected = stock.velocity(changed, target, None, 1.0, x[0], SIGMA)
    found = asked(pack, injecting(model, mask=mask), family, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = stock.velocity(model, target, None, 1.0, x[0], SIGMA)
    assert (found - plain).abs().max() > 1e-3


# What is controlled


@pytest.mark.parametrize(
    ("name", "coarse"), [("SD1.5", False), ("SDXL", True), ("SD3", True), ("Flux.2", False)]
)
def test_coarse_grids_are_half_the_latents(
    pack: ModuleType, tiny_model: TinyModel, name: str, coarse: bool
) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    runs = [
        asked(pack, Control(pack, family, cross, own, grids).on(model), family, x)
        for cross, own, grids in ((0.0, 0.0, "all"), (0.0, 1.0, "coarse"), (0.0, 1.0, "all"))
    ]
    assert torch.equal(runs[0], runs[1]) != coarse
    assert torch.equal(runs[1], runs[2]) == coarse


def test_only_the_chosen_blocks_are_controlled(pack: ModuleType, tiny_model: TinyModel) -> None:
    family = FAMILIES["SD1.5"]
    model, x = tiny_model("sd15"), (family.latent(1, 4), family.latent(1, 5))
    control = Control(pack, family, mapping=swap(), blocks="output")
    found = asked(pack, control.on(model), family, x)
    expected = control.written_out(model, prompts_of(family), x, SIGMA)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("until", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_control_ends_in_time(pack: ModuleType, tiny_model: TinyModel, until: float) -> None:
    family, model = FAMILIES["SD3"], tiny_model("sd3")
    end = float(model.get_model_object("model_sampling").percent_to_sigma(until))
    x = family.latent(1, 4), family.latent(1, 5)
    off = asked(pack, Control(pack, family, 0.0, 0.0).on(model), family, x)
    for cross, own in ((until, 0.0), (0.0, until)):
        found = asked(pack, Control(pack, family, cross, own, mapping=swap()).on(model), family, x)
        assert torch.equal(found, off) == (end >= SIGMA)


# What it says


def test_another_guider_is_refused(pack: ModuleType, tiny_model: TinyModel) -> None:
    family = FAMILIES["SD1.5"]
    controlled = Control(pack, family).on(tiny_model("sd15"))
    with pytest.raises(ValueError, match="use a Prompt-to-Prompt Guider"):
        stock.velocity(controlled, family.prompt(1), None, 1.0, family.latent(), SIGMA)


@some
def test_other_prompts_are_refused(pack: ModuleType, tiny_model: TinyModel, name: str) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    longer = Control(pack, family, mapping=torch.eye(30), weight=torch.ones(30))
    with pytest.raises(ValueError, match="12 tokens where Prompt-to-Prompt made one of 30"):
        asked(pack, longer.on(model), family, x)


@some
def test_nothing_sticks_to_the_model(pack: ModuleType, tiny_model: TinyModel, name: str) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    state = patcher_state(model)
    before = stock.velocity(model, *prompts_of(family), 2.0, x[0], SIGMA)
    controlled = Control(pack, family, mapping=swap()).on(model)
    asked(pack, controlled, family, x)
    assert torch.equal(stock.velocity(model, *prompts_of(family), 2.0, x[0], SIGMA), before)
    assert patcher_state(model) == state
