"""Whole samplings of Prompt-to-Prompt Guider: equal prompts, the source's way, local blend."""

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
from host.tapping import FAMILIES, WORDS, Family

TinyModel = Callable[[str], Any]

some = pytest.mark.parametrize("name", ["SD1.5", "SDXL", "SD3", "Flux"])
GUIDANCE = 2.0


def prompt(family: Family, seed: int) -> stock.Conditioning:
    """With the guidance that the guider gives as a number."""
    return stock.with_values(family.prompt(seed), guidance=GUIDANCE)


def schedule(model: Any, steps: int = 5) -> Tensor:
    return stock.call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[
        0
    ]


def sampled(
    guider: Any, latent: Tensor, sampler: Any = None, noise: Any = None, sigmas: Any = None
) -> Tensor:
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


def noise_of(pack: ModuleType, way: Any) -> Any:
    return pack.nodes.host.inversion.InvertedNoise(way.noise)


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


# Local blend


def words_at(*places: int) -> tuple[Tensor, Tensor]:
    column = torch.zeros(WORDS)
    column[list(places)] = 1
    return column, column


# A tiny SDXL has 2x3 tokens at this size, all of which are beside the hottest.
@pytest.mark.parametrize("name", ["SD1.5", "SD3", "Flux"])
def test_outside_of_the_words_an_inverted_source_keeps_its_bits(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(1)
    way, changed = trajectory_of(pack, model, latent), []
    for threshold in (0.0, 0.995, 1.0):
        control = Control(pack, family, 0.0, 0.0, blend=words_at(4), threshold=threshold)
        guider = guider_of(control.on(model), family, trajectory=way)
        edited = sampled(guider, latent, noise=noise_of(pack, way))
        same = (edited == latent).all(1)
        changed.append(float((~same).float().mean()))
        assert torch.equal(edited[:, :, same[0]], latent[:, :, same[0]])
    assert changed[0] == 1
    assert 0 < changed[1] < 1
    assert changed[2] == 0


@some
def test_outside_of_the_words_the_source_arises(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(1)
    source = sampled(stock_guider(model, family, 1), latent)
    control = Control(pack, family, 0.0, 0.0, blend=words_at(4), threshold=1.0)
    found = sampled(guider_of(control.on(model), family), latent)
    torch.testing.assert_close(found, source, rtol=1e-3, atol=2e-3 * float(source.std()))


def test_the_area_is_where_both_prompts_look(pack: ModuleType, tiny_model: TinyModel) -> None:
    """The maps of all blocks on the grid, mean over heads, summed up over the run."""
    family = FAMILIES["SD3"]
    model, latent = tiny_model("sd3"), family.latent(1)
    blend = (words_at(4)[0], torch.zeros(WORDS))
    control = Control(pack, family, 0.0, 0.0, blend=blend, threshold=0.8)
    guider = guider_of(control.on(model), family)
    sampled(guider, latent)
    (grid,) = guider.blend.heat.sums
    source, target = guider.blend.heat.sums[grid]
    assert grid == (1, 4, 5)
    assert not target.any()
    assert float(source.sum()) > 0
    expected = pack.kernels.prompt_to_prompt.word_area(source.view(1, *grid), (7, 9), 0.8)
    assert torch.equal(guider.blend.area, expected)


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
