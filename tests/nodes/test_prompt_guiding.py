"""Whole samplings of Prompt-to-Prompt Guider: equal prompts, the source's way, null-text."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import Edit
from host.inversions import Calls, euler
from host.maps import Control, pair_guider
from host.pairs import (
    GUIDANCE,
    guider_of,
    noise_of,
    sampled,
    stock_guider,
    trajectory_of,
    words_at,
)
from host.tapping import FAMILIES, WORDS, Family

TinyModel = Callable[[str], Any]

some = pytest.mark.parametrize("name", ["SD1.5", "SDXL", "SD3", "Flux"])


# The same prompts


@some
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral", "ddim"])
def test_equal_prompts_are_plain_sampling(
    pack: ModuleType, tiny_model: TinyModel, name: str, sampler: str
) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), torch.zeros_like(family.latent(2))
    ours, theirs = (
        sampled(guider, latent, stock.call("KSamplerSelect", sampler_name=sampler)[0])
        for guider in (
            guider_of(Control(pack, family).on(model), family, 1, 1),
            stock_guider(model, family, 1),
        )
    )
    assert torch.equal(ours, theirs)


@some
def test_a_control_that_is_off_leaves_plain_sampling(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(1)
    off = Control(pack, family, 0.0, 0.0).on(model)
    found = sampled(guider_of(off, family), latent)
    assert torch.equal(found, sampled(guider_of(model, family), latent))
    plain = sampled(stock_guider(model, family, 2), latent)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=2e-3 * float(plain.std()))
    controlled = sampled(guider_of(Control(pack, family).on(model), family), latent)
    assert (controlled - plain).abs().max() > 0.02 * plain.std()


def test_the_same_prompt_with_another_weight_is_another(
    pack: ModuleType, tiny_model: TinyModel
) -> None:
    family = FAMILIES["SD1.5"]
    model, latent, weight = tiny_model("sd15"), family.latent(), torch.ones(WORDS)
    plain = sampled(guider_of(Control(pack, family).on(model), family, 1, 1), latent)
    weight[4] = 5.0
    heavy = sampled(guider_of(Control(pack, family, weight=weight).on(model), family, 1, 1), latent)
    assert (heavy - plain).abs().max() > 0.02 * plain.std()


# The source's way


@some
def test_the_source_arises_beside_the_target(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    """By the latents that the model is shown: those of ComfyUI's Euler with the source prompt."""
    family = FAMILIES[name]
    calls, latent = Calls(tiny_model(family.model)), family.latent(2)
    sampled(stock_guider(calls.model, family, 1), latent)
    expected = [rows[:2] for rows in calls.latents]
    calls.latents.clear()
    sampled(guider_of(Control(pack, family).on(calls.model), family), latent)
    # Branches come in the opposite order: the source's are first.
    for rows, source in zip(calls.latents, expected, strict=True):
        torch.testing.assert_close(rows[:2], source, rtol=1e-3, atol=1e-3)


def test_samplers_that_ask_between_the_steps(pack: ModuleType, tiny_model: TinyModel) -> None:
    """The source goes on by Euler over all noise levels that are asked for."""
    family = FAMILIES["SD1.5"]
    calls, latent = Calls(tiny_model("sd15")), family.latent()
    sampler = stock.call("KSamplerSelect", sampler_name="dpm_2")[0]
    controlled = Control(pack, family).on(calls.model)
    sampled(guider_of(controlled, family, source_guidance=1.0), latent, sampler)
    shown = [(s, rows[:1]) for s, rows in zip(calls.sigmas, calls.latents, strict=True)]
    levels = torch.tensor([sigma for sigma, _ in shown] + [0.0])
    calls.latents.clear()
    plain = stock.call("BasicGuider", model=calls.model, conditioning=family.prompt(1))[0]
    sampled(plain, latent, sigmas=levels)
    for (_, source), rows in zip(shown, calls.latents, strict=True):
        torch.testing.assert_close(source, rows, rtol=1e-3, atol=1e-3)


@some
def test_a_trajectory_holds_the_source(pack: ModuleType, tiny_model: TinyModel, name: str) -> None:
    family = FAMILIES[name]
    calls, latent = Calls(tiny_model(family.model)), family.latent(2)
    way = trajectory_of(pack, calls.model, latent)
    controlled = Control(pack, family).on(calls.model)
    sampled(guider_of(controlled, family, trajectory=way), latent, noise=noise_of(pack, way))
    assert len(calls.latents) == len(way.sigmas) - 1
    for rows, source in zip(calls.latents, way.latents, strict=False):
        # The source has no negative prompt then: its attention is all that is asked for.
        assert torch.equal(rows[:2], source)
        assert len(rows) == (4 if name == "Flux" else 6)


@some
def test_a_second_run_is_the_same(pack: ModuleType, tiny_model: TinyModel, name: str) -> None:
    family = FAMILIES[name]
    latent, blend = family.latent(2), words_at(4)
    controlled = Control(pack, family, blend=blend).on(tiny_model(family.model))
    guider = guider_of(controlled, family)
    assert torch.equal(sampled(guider, latent), sampled(guider, latent))


@some
def test_a_batch_is_single_runs(pack: ModuleType, tiny_model: TinyModel, name: str) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(2)
    way = trajectory_of(pack, model, latent)
    controlled = Control(pack, family, blend=words_at(4), threshold=0.8).on(model)
    guider = guider_of(controlled, family, trajectory=way)
    both = sampled(guider, latent, noise=noise_of(pack, way))
    for row in range(2):
        one = slice(row, row + 1)
        made = (way.sigmas, way.latents[:, one], way.noise[one], way.family)
        alone = pack.nodes.host.inversion.Trajectory(*made)
        guider = guider_of(controlled, family, trajectory=alone)
        single = sampled(guider, latent[one], noise=noise_of(pack, alone))
        torch.testing.assert_close(both[one], single, rtol=1e-3, atol=2e-3 * float(single.std()))


# Null-text


def null_text_of(pack: ModuleType, model: Any, family: Family, latent: Tensor) -> Any:
    host, plain = pack.nodes.host, trajectory_of(pack, model, latent)
    embeddings = torch.stack([family.prompt(seed)[0][0] for seed in range(20, 25)])
    return host.null_text.NullTextTrajectory(
        *(plain.sigmas, plain.latents, plain.noise, plain.family),
        replayed=plain.latents,
        embeddings=embeddings,
        negative=family.prompt(9),
        guidance=GUIDANCE,
    )


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_null_text_embeddings_are_the_negative_prompt(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(1)
    way = null_text_of(pack, model, family, latent)
    off = Control(pack, family, 0.0, 0.0).on(model)
    guider = pair_guider(
        off, family.prompt(1), family.prompt(2), None, 1.0, GUIDANCE, trajectory=way
    )
    found = sampled(guider, latent, noise=noise_of(pack, way))
    replay = pack.nodes.host.null_text.ReplayGuider(model, way, family.prompt(2), GUIDANCE)
    expected = sampled(replay, latent, noise=noise_of(pack, way))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 * float(expected.std()))
    plain = sampled(stock_guider(model, family, 2), latent, noise=noise_of(pack, way))
    assert (found - plain).abs().max() > 0.02 * plain.std()


# Among others


def test_an_edit_sampler_is_controlled_too(pack: ModuleType, tiny_model: TinyModel) -> None:
    model = tiny_model("sd3")
    control = Control(pack, FAMILIES["SD3"])
    edit = Edit(model, source_guidance=1.0, target_guidance=1.0)
    plain, controlled = edit.run(), edit.having(model=control.on(model)).run()
    assert (controlled - plain).abs().max() > 0.02
    same = edit.having(model=control.on(model), target=edit.source)
    assert torch.equal(same.run(), edit.latent)


# What it says


def test_what_does_not_fit_is_refused(pack: ModuleType, tiny_model: TinyModel) -> None:
    family, model = FAMILIES["SD1.5"], tiny_model("sd15")
    way = trajectory_of(pack, model, family.latent())
    controlled = Control(pack, family).on(model)
    with pytest.raises(ValueError, match="the sampler has 2 x 4x7x9"):
        sampled(guider_of(controlled, family, trajectory=way), family.latent(2))
    other = FAMILIES["SD3"]
    with pytest.raises(ValueError, match="trajectory was made with SD15, the model is SD3"):
        guider_of(Control(pack, other).on(tiny_model("sd3")), other, trajectory=way)
    with pytest.raises(ValueError, match="negative is not connected"):
        pair_guider(controlled, family.prompt(1), family.prompt(2), None, 1.0, 3.0)


def test_what_has_no_effect_is_said(
    pack: ModuleType, tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    family, model = FAMILIES["SD1.5"], tiny_model("sd15")
    latent = family.latent()
    controlled = Control(pack, family).on(model)
    with caplog.at_level(logging.WARNING):
        sampled(guider_of(controlled, family), latent)
        sampled(guider_of(controlled, family, 1, 1), latent)
        assert "Pinpoint" not in caplog.text
        guider_of(model, family)
        assert "put Prompt-to-Prompt before it" in caplog.text
        way = trajectory_of(pack, model, latent)
        sampled(guider_of(controlled, family, trajectory=way), latent)
        assert "starts far from the trajectory" in caplog.text
        tuned = null_text_of(pack, model, family, latent)
        guider_of(controlled, family, trajectory=tuned)
        assert "were tuned for guidance" not in caplog.text
        guider_of(controlled, family, trajectory=tuned, target_guidance=4.5)
        assert "were tuned for guidance 2, the guider has 4.5" in caplog.text
        flow = Control(pack, FAMILIES["SD3"]).on(tiny_model("sd3"))
        stock_sampler = Edit(flow).parts()
        stock_sampler["sampler"] = euler()
        stock.call("SamplerCustomAdvanced", **stock_sampler)
        assert "so nothing was controlled" in caplog.text


# Nothing left


@pytest.mark.parametrize("failing", [False, True])
def test_what_a_step_shares_goes_with_it(
    pack: ModuleType, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    family, made, values = FAMILIES["SD1.5"], [], pack.nodes.host.values
    real, count = values.SharedValues, iter(range(100))

    def make(*given: Any) -> Any:
        store = real(*given)
        made.append(weakref.ref(store))
        return store

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        if failing and next(count) == 2:
            raise RuntimeError("something in another pack")
        return executor(*args, **kwargs)

    monkeypatch.setattr(values, "SharedValues", make)
    model = tiny_model("sd15").clone()
    model.add_wrapper_with_key("apply_model", "trap", fail)
    with suppress(RuntimeError):
        sampled(guider_of(Control(pack, family).on(model), family), family.latent())
    gc.collect()
    assert len(made) == (3 if failing else 5)
    assert not any(store() for store in made)
