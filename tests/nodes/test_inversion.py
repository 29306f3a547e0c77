"""Flow Solver, Invert and Noise from Latent against ComfyUI's Euler and loops written out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.edits import latent_for, left_half, noises, patcher_state, picture_latent
from host.inversions import (
    FLOWS,
    METHODS,
    Calls,
    Inversion,
    euler,
    guider_for,
    inversion_for,
    sample,
    solver,
    velocity,
)

TinyModel = Callable[[str], Any]

models = pytest.mark.parametrize("name", FLOWS)
methods = pytest.mark.parametrize("method", METHODS)
SCHEDULES = {
    "whole": (1.0, 0.8, 0.55, 0.3, 0.0),
    "from below 1": (0.8, 0.55, 0.3, 0.0),
    "to above 0": (1.0, 0.8, 0.55, 0.3),
    "part": (0.9, 0.6, 0.4, 0.15),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

# Of float32 on latents of a few units; larger ones tell of another way.
TOLERANCE = 1e-5


def written_out(job: Inversion, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    """The end of an inversion by the papers' formulas, in the model's space."""
    x = job.model.model.process_latent_in(job.latent)
    x = x * (1 - job.schedule[-1])
    last: Tensor | None = None
    for s, n in pairwise(job.schedule[::-1]):
        if job.method in ("RF-Solver", "FireFlow"):
            first = last if job.method == "FireFlow" and last is not None else velocity(x, s)
            v = last = velocity(x + (n - s) / 2 * first, (s + n) / 2)
        else:
            v = velocity(x, s)
        if job.method == "RF-Inversion":
            v = v + job.gamma * ((next(noises(job.seed, x)) - x) / (1 - s) - v)
        x = x + (n - s) * v
    return x


def just_above_zero(velocity: Callable[[Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """At sigma 0 there is nothing that a velocity could be read from."""
    return lambda x, sigma: velocity(x, max(sigma, 1e-3))


# Sampling


@models
@schedules
@pytest.mark.parametrize("masked", [False, True], ids=["whole picture", "noise mask"])
def test_euler_is_comfyuis(
    tiny_model: TinyModel, name: str, schedule: tuple[float, ...], masked: bool
) -> None:
    model, latent = tiny_model(name), latent_for(name, 2, 5, 6)
    settings: dict[str, Any] = dict(sigmas=torch.tensor(schedule), noise=5)
    settings["noise_mask"] = left_half(latent) if masked else None
    found = sample(model, latent, solver("Euler"), **settings)
    expected = sample(model, latent, euler(), **settings)
    assert (expected - latent).abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
@methods
@schedules
def test_inversions_follow_their_papers(
    tiny_model: TinyModel, name: str, method: str, schedule: tuple[float, ...]
) -> None:
    model = tiny_model(name)
    job = inversion_for(model, name, method=method, schedule=schedule)
    _, latent, trajectory, _ = job.run()
    asked = just_above_zero(lambda x, s: velocity(model, job.prompt, x, s))
    expected = written_out(job, asked)
    # Velocities just above sigma 0 are differences of numbers that agree to three digits.
    torch.testing.assert_close(trajectory.latents[0], expected, rtol=0, atol=1e-3)
    clean = model.model.process_latent_in(job.latent)
    torch.testing.assert_close(trajectory.latents[-1], clean * (1 - schedule[-1]))
    assert trajectory.sigmas == pytest.approx(schedule)
    assert trajectory.latents.shape == (len(schedule), *clean.shape)
    assert torch.isfinite(latent["samples"]).all()


@methods
@pytest.mark.parametrize("rising", [False, True])
def test_calls_of_a_run(tiny_model: TinyModel, method: str, rising: bool) -> None:
    calls = Calls(tiny_model("sd3"))
    sigmas = torch.tensor(SCHEDULES["whole"])
    sigmas = sigmas.flip(0) if rising else sigmas
    sample(calls.model, picture_latent(), solver(method), sigmas=sigmas)
    starts, middles = sigmas[:-1].tolist(), ((sigmas[:-1] + sigmas[1:]) / 2).tolist()
    expected = {
        "RF-Solver": [s for pair in zip(starts, middles, strict=True) for s in pair],
        "FireFlow": [starts[0], *middles],
    }.get(method, starts)
    assert calls.sigmas == pytest.approx([max(sigma, 1e-3) for sigma in expected])


# There and back


@models
@schedules
@methods
def test_the_noise_leads_to_where_the_inversion_ended(
    tiny_model: TinyModel, name: str, schedule: tuple[float, ...], method: str
) -> None:
    calls = Calls(tiny_model(name))
    latent = latent_for(name, 1, 5, 6)
    job = inversion_for(calls.model, name, latent=latent, schedule=schedule, method=method)
    noise, wire, trajectory, _ = job.run()
    again = stock.call("PinpointNoiseFromLatent", model=calls.model, latent=wire)[0]
    for given in (noise, again):
        calls.latents.clear()
        job.sampled(solver("Euler"), given)
        torch.testing.assert_close(calls.latents[0], trajectory.latents[0], rtol=0, atol=2e-5)


@schedules
@methods
def test_flipped_sigmas_invert_as_the_node_does(
    tiny_model: TinyModel, schedule: tuple[float, ...], method: str
) -> None:
    job = Inversion(tiny_model("flux"), picture_latent(2), schedule, method)
    flipped = stock.call("FlipSigmas", sigmas=job.sigmas)[0]
    silence = stock.call("DisableNoise")[0]
    silence.seed = job.seed
    settings = dict(prompt=job.prompt, sigmas=flipped, noise=silence)
    found = sample(job.model, job.latent, solver(method), **settings)
    # Flip Sigmas puts 0.0001 in place of 0.
    assert schedule[-1] > 0 or flipped[0] > 0
    expected = job.run()[1]["samples"]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(job.having(schedule=tuple(flipped)).run()[1]["samples"], expected)


@models
def test_the_better_solver_comes_closer(tiny_model: TinyModel, name: str) -> None:
    errors = {}
    # These velocities turn faster than 10 steps can follow.
    steps = 20 if name in ("chroma", "zimage") else 10
    schedule = tuple((1 - i / steps) for i in range(steps + 1))
    for method in ("Euler", "RF-Solver", "FireFlow"):
        job = inversion_for(tiny_model(name), name, schedule=schedule, method=method)
        errors[method] = (job.sampled(solver(method)) - job.latent).square().mean().sqrt()
    assert errors["RF-Solver"] < errors["Euler"] / 3
    assert errors["FireFlow"] < errors["Euler"]


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_full_pull_returns_the_picture_and_reaches_the_noise(
    tiny_model: TinyModel, name: str
) -> None:
    model, latent = tiny_model(name), latent_for(name, 2)
    pulling = solver("RF-Inversion", eta=1.0, eta_end=1.0)
    settings = dict(sigmas=torch.tensor(SCHEDULES["whole"]), noise=9)
    torch.testing.assert_close(
        sample(model, latent, pulling, **settings), latent, rtol=0, atol=TOLERANCE
    )
    # Without a pull it is Euler, bit for bit; with one in a part of the steps it is neither.
    plain = sample(model, latent, solver("Euler"), **settings)
    for off in (dict(eta=0.0, eta_end=1.0), dict(eta=1.0, eta_start=0.8, eta_end=0.8)):
        assert torch.equal(sample(model, latent, solver("RF-Inversion", **off), **settings), plain)
    partly = sample(model, latent, solver("RF-Inversion", eta=1.0, eta_end=0.5), **settings)
    distances = [(partly - other).abs().max() for other in (plain, latent)]
    assert min(distances) > 0.05
    for schedule in (SCHEDULES["whole"], SCHEDULES["from below 1"]):
        job = Inversion(model, latent, schedule, "RF-Inversion", gamma=1.0)
        noise = job.run()[0].generate_noise({"samples": latent})
        torch.testing.assert_close(noise, next(noises(job.seed, latent)), rtol=0, atol=1e-4)


def test_trends_of_the_pull(tiny_model: TinyModel) -> None:
    model, latent = tiny_model("sd3"), picture_latent()
    schedule = (1.0, 0.75, 0.5, 0.25, 0.0)
    clean = model.model.process_latent_in(latent)
    for trend, etas in (("rising", (0, 0.2, 0.4, 0.6)), ("falling", (0.8, 0.6, 0.4, 0.2))):
        pulling = solver("RF-Inversion", eta=0.8, eta_end=1.0, eta_trend=trend)
        found = sample(model, latent, pulling, sigmas=torch.tensor(schedule), noise=9)
        x = stock.call("RandomNoise", noise_seed=9)[0].generate_noise({"samples": latent})
        for (s, n), eta in zip(pairwise(schedule), etas, strict=True):
            v = velocity(model, stock.conditioning(2), x, s)
            x = x + (n - s) * (v + eta * ((x - clean) / s - v))
        expected = model.model.process_latent_out(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# What the node says and shows


@pytest.mark.parametrize(
    ("method", "calls"), [("RF-Solver", 8), ("FireFlow", 5), ("Euler", 4), ("RF-Inversion", 4)]
)
def test_the_report_is_true(tiny_model: TinyModel, method: str, calls: int) -> None:
    counted = Calls(tiny_model("sd3"))
    job = Inversion(counted.model, picture_latent(2), method=method)
    noise, wire, trajectory, report = job.run()
    assert report == f"4 steps, {calls} model calls"
    assert len(counted.sigmas) == calls
    noise_2, wire_2, trajectory_2, report_2 = job.having(measure_round_trip=True).run()
    like = {"samples": job.latent}
    assert torch.equal(noise_2.generate_noise(like), noise.generate_noise(like))
    assert torch.equal(wire_2["samples"], wire["samples"])
    assert torch.equal(trajectory_2.latents, trajectory.latents)
    assert len(counted.sigmas) == 3 * calls
    back = job.sampled(solver(method, eta=0.0), noise)
    share = float((back - job.latent).norm() / job.latent.norm())
    decibels = -20 * math.log10(share)
    first, second = report_2.split("\n")
    assert first == report
    assert second == f"round trip: {100 * share:.2f} % of the latent's size ({decibels:.1f} dB)"


@methods
@pytest.mark.parametrize("rising", [False, True])
def test_previews_come_once_a_step(tiny_model: TinyModel, method: str, rising: bool) -> None:
    model, latent = tiny_model("sd3"), picture_latent()
    shown: list[tuple[int, Tensor, Tensor, int]] = []
    sigmas = torch.tensor(SCHEDULES["whole"])
    sigmas = sigmas.flip(0) if rising else sigmas
    pairs = list(pairwise(sigmas.tolist()))
    guider = guider_for(model, stock.conditioning(1))
    with torch.inference_mode():
        guider.sample(
            torch.zeros_like(latent),
            latent,
            solver(method),
            sigmas,
            callback=lambda *args: shown.append(args),
            disable_pbar=True,
            seed=1,
        )
    assert [(step, total) for step, _, _, total in shown] == [(i, 4) for i in range(4)]
    denoised, x = ([entry[place] for entry in shown] for place in (1, 2))
    clean = model.model.process_latent_in(latent)
    # What is seen at sigma 0 is the picture; along a straight way it is so all the time.
    torch.testing.assert_close(denoised[0] if rising else x[-1], clean if rising else denoised[-1])
    straight = [x[i] + (x[i] - x[i - 1]) * s / (n - s) for i, (n, s) in enumerate(pairs) if i]
    torch.testing.assert_close(denoised[1:], straight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("measured", [False, True])
def test_previews_of_the_node_count_both_ways(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    import latent_preview

    shown = []
    monkeypatch.setattr(
        latent_preview,
        "prepare_callback",
        lambda _model, steps: lambda step, _x0, _x, total: shown.append((step, steps, total)),
    )
    Inversion(tiny_model("sd3"), measure_round_trip=measured).run()
    total = 8 if measured else 4
    assert shown == [(step, total, total) for step in range(total)]


def test_a_mask_on_the_way_to_noise_is_ignored_and_said(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model, latent = tiny_model("sd3"), picture_latent()
    settings = dict(sigmas=torch.tensor((0.2, 0.6, 1.0)))
    plain = sample(model, latent, solver(), **settings)
    with caplog.at_level(logging.WARNING):
        masked = sample(model, latent, solver(), noise_mask=left_half(latent), **settings)
    assert torch.equal(masked, plain)
    assert "mask is not used" in caplog.text


def test_the_latent_wire_keeps_what_belongs_to_it(tiny_model: TinyModel) -> None:
    latent = {"samples": picture_latent(), "noise_mask": torch.ones(1, 8, 8), "batch_index": [4]}
    job = Inversion(tiny_model("sd3"))
    wire = stock.call("PinpointInvert", **{**job.wires(), "latent": latent}, **job.widgets())[1]
    assert wire.keys() == {"samples", "batch_index"}
    assert latent.keys() == {"samples", "noise_mask", "batch_index"}


def test_settings_without_effect_are_said(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    latent = {"samples": picture_latent(), "noise_mask": torch.ones(1, 8, 8)}
    job = Inversion(tiny_model("sd3"))
    with caplog.at_level(logging.WARNING):
        stock.call("PinpointInvert", **{**job.wires(), "latent": latent}, **job.widgets())
        solver("RF-Inversion", eta_start=0.4, eta_end=0.3)
    assert "the latent's mask is not used" in caplog.text
    assert "eta_start 0.4 is not before eta_end 0.3" in caplog.text


def test_a_flow_solver_refuses_other_models(tiny_model: TinyModel) -> None:
    with pytest.raises(ValueError, match="model is SD15, which does not predict a flow velocity"):
        sample(tiny_model("sd15"), torch.zeros(1, 4, 8, 8), solver(), sigmas=torch.tensor([1.0, 0]))


# Guidance


def test_embedded_guidance_is_given_as_a_number(tiny_model: TinyModel) -> None:
    job = Inversion(tiny_model("flux"), method="Euler", guidance=3.0)
    told = stock.with_values(job.source, guidance=3.0)
    expected = written_out(job, just_above_zero(lambda x, s: velocity(job.model, told, x, s)))
    _, _, trajectory, _ = job.run()
    torch.testing.assert_close(trajectory.latents[0], expected, rtol=0, atol=1e-3)
    other = job.having(guidance=1.0).run()[2].latents[0]
    assert (other - expected).abs().max() > 0.01
    # The number on the wire gives way to the widget's, and a negative prompt is not asked.
    calls = Calls(job.model)
    same = job.having(model=calls.model, source=stock.with_values(job.source, guidance=9.0))
    same = same.having(negative=stock.conditioning(3))
    assert torch.equal(same.run()[2].latents[0], trajectory.latents[0])
    assert {len(x) for x in calls.latents} == {1}


def test_guidance_with_a_negative_prompt(tiny_model: TinyModel) -> None:
    negative = stock.conditioning(3)
    job = Inversion(tiny_model("sd3"), method="Euler", guidance=2.5, negative=negative)

    def guided(x: Tensor, sigma: float) -> Tensor:
        return stock.velocity(job.model, job.source, negative, 2.5, x, sigma)

    found = job.run()[2].latents[0]
    expected = written_out(job, just_above_zero(guided))
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)
    assert (found - job.having(guidance=1.0).run()[2].latents[0]).abs().max() > 0.1


# Other packs, and nothing left behind


@pytest.mark.parametrize("hook", ["LoRA", "optimized_attention_override", "post-CFG"])
def test_hooks_of_other_packs_act_and_nothing_sticks(tiny_model: TinyModel, hook: str) -> None:
    plain, x = tiny_model("sd3"), picture_latent(seed=5)
    model = foreign.HOOKS[hook](plain)
    job = Inversion(model, method="Euler")
    before, state = velocity(model, job.source, x, 0.6), patcher_state(model)
    found = job.having(measure_round_trip=True).run()[2].latents[0]
    expected = written_out(job, just_above_zero(lambda x, s: velocity(model, job.prompt, x, s)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert (found - job.having(model=plain).run()[2].latents[0]).abs().max() > 0.01
    assert patcher_state(model) == state
    assert torch.equal(velocity(model, job.source, x, 0.6), before)
