"""Null-Text Inversion and its guider against the published loop and ComfyUI's samplers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import picture_latent
from host.inversions import Calls
from host.null_texts import MODELS, inverted, null_text_for, predicted

TinyModel = Callable[[str], Any]

models = pytest.mark.parametrize("name", MODELS)


def v_predicting(model: Any) -> Any:
    """A model whose output ComfyUI takes for a v-prediction."""
    return stock.call("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)[0]


# There and back


@models
def test_the_way_to_noise_is_ddims(tiny_model: TinyModel, name: str) -> None:
    job = null_text_for(tiny_model(name), name, inner_steps=0)
    _, _, trajectory, _ = job.run()
    x = job.model.model.process_latent_in(job.latent)
    expected = [x]
    for sigma, following in pairwise(job.schedule[::-1]):
        shown = x * (math.hypot(1, following) / math.hypot(1, sigma))
        x = x + (following - sigma) * predicted(job, shown, following)
        expected.append(x)
    assert trajectory.sigmas == pytest.approx(job.schedule)
    torch.testing.assert_close(trajectory.latents, torch.stack(expected[::-1]), rtol=0, atol=2e-5)


@models
@pytest.mark.parametrize("schedule", [(1.0, 0.6, 0.25, 0.0), None], ids=["part", "whole"])
def test_the_noise_leads_to_where_the_inversion_ended(
    tiny_model: TinyModel, name: str, schedule: tuple[float, ...] | None
) -> None:
    """ComfyUI scales the noise of a whole schedule in another way."""
    calls = Calls(tiny_model(name))
    if schedule is None:
        highest = float(calls.model.model.model_sampling.sigma_max)
        schedule = (highest, 3.0, 0.0)
    job = null_text_for(calls.model, name, schedule=schedule, inner_steps=0)
    noise, wire, trajectory, _ = job.run()
    again = stock.call("PinpointNoiseFromLatent", model=calls.model, latent=wire)[0]
    for given in (noise, again):
        calls.latents.clear()
        job.back(given, job.replaying(trajectory))
        first = trajectory.latents[0].expand_as(calls.latents[0])
        torch.testing.assert_close(calls.latents[0], first, rtol=1e-5, atol=2e-5)


@models
def test_stock_samplers_follow_the_trajectory(tiny_model: TinyModel, name: str) -> None:
    calls = Calls(tiny_model(name))
    job = null_text_for(calls.model, name, latent=picture_latent(2, 6, 5, channels=4))
    noise, _, trajectory, _ = job.run()
    end = job.model.model.process_latent_out(trajectory.replayed[-1])
    for sampler in ("euler", "ddim"):
        calls.latents.clear()
        back = job.back(noise, job.replaying(trajectory), sampler)
        followed = torch.stack([x[: len(job.latent)] for x in calls.latents])
        torch.testing.assert_close(followed, trajectory.replayed[:-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(back, end, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("sd15", "noise"), ("sdxl", "noise"), ("sdxl", "v")])
def test_the_picture_comes_back_only_with_the_embeddings(
    tiny_model: TinyModel, name: str, kind: str
) -> None:
    model = tiny_model(name) if kind == "noise" else v_predicting(tiny_model(name))
    job = null_text_for(model, name, inner_steps=12, learning_rate=0.03)
    noise, _, trajectory, report = job.run()
    stated = float(re.findall(r"round trip: ([\d.]+) %", report)[0]) / 100
    for sampler in ("euler", "ddim"):
        tuned = job.error(job.back(noise, job.replaying(trajectory), sampler))
        plain = job.error(job.back(noise, job.plain(), sampler))
        assert tuned < plain / 3, (tuned, plain)
        assert tuned == pytest.approx(stated, abs=2e-4)


@models
def test_another_prompt_leads_elsewhere(tiny_model: TinyModel, name: str) -> None:
    job, noise, trajectory = inverted(tiny_model, name)
    other = [[-job.source[0][0], job.source[0][1]]]
    edited = job.back(noise, job.having(source=other).replaying(trajectory))
    assert (edited - job.back(noise, job.replaying(trajectory))).abs().max() > 0.05


# How embeddings are tuned


def test_tuning_is_the_published_loop(tiny_model: TinyModel) -> None:
    """Written out with a copy of the model whose weights gradients can pass."""
    job = null_text_for(tiny_model("sd15"), "sd15", inner_steps=3, early_stop=0.0)
    _, _, trajectory, report = job.run()
    steps = len(job.schedule) - 1
    assert report.startswith(f"{steps} steps, {3 * steps} of {3 * steps} gradient steps\n")
    with torch.inference_mode(False), torch.enable_grad():
        network = copy.deepcopy(job.model.model.diffusion_model)
        x, prompt = trajectory.latents[0].clone(), job.source[0][0].clone()
        embedding = job.negative[0][0].clone()

        def noise(x: Tensor, text: Tensor, sigma: float) -> Tensor:
            time = job.model.model.model_sampling.timestep(torch.tensor([sigma]))
            return network(x / math.hypot(1, sigma), time.float(), context=text)

        def step(x: Tensor, wanted: Tensor, text: Tensor, s: float, n: float) -> Tensor:
            away = noise(x, text, s)
            return x + (n - s) * (away + job.guidance * (wanted - away))

        for i, (s, n) in enumerate(pairwise(job.schedule)):
            with torch.no_grad():
                wanted = noise(x, prompt, s)
            embedding = embedding.detach().requires_grad_()
            rate = job.learning_rate * (1 - 0.5 * i / steps)
            optimiser = torch.optim.Adam([embedding], rate)
            for _ in range(3):
                off = step(x, wanted, embedding, s, n) - trajectory.latents[i + 1].clone()
                optimiser.zero_grad()
                (off / math.hypot(1, n)).square().mean().backward()
                optimiser.step()
            # Adam's first steps are signs of gradients, so that roundings may turn a few.
            close = (trajectory.embeddings[i] - embedding.detach()).abs() < 1e-4
            assert close.float().mean() > 0.98
            embedding = trajectory.embeddings[i].clone()
            with torch.no_grad():
                x = step(x, wanted, embedding, s, n)
            torch.testing.assert_close(trajectory.replayed[i + 1], x, rtol=0, atol=1e-4)
    moved = (trajectory.embeddings[-1] - job.negative[0][0]).abs().max()
    assert moved > 0.01


@models
def test_each_picture_has_its_own_embedding(tiny_model: TinyModel, name: str) -> None:
    latent = picture_latent(2, 6, 5, channels=4)
    latent[1] *= 0.5
    job = null_text_for(tiny_model(name), name, latent=latent, inner_steps=1)
    _, _, together, _ = job.run()
    assert together.embeddings.shape[:2] == (3, 2)
    assert not torch.equal(together.embeddings[:, 0], together.embeddings[:, 1])
    for row in (0, 1):
        alone = job.having(latent=latent[row : row + 1]).run()[2]
        close = (alone.embeddings - together.embeddings[:, row : row + 1]).abs() < 1e-4
        assert close.float().mean() > 0.98


@pytest.mark.parametrize(
    ("settings", "updates"),
    [({"early_stop": 100.0}, 0), ({"inner_steps": 0}, 0), ({"guidance": 1.0}, 0), ({}, 6)],
    ids=["good enough", "no inner steps", "guidance 1", "all"],
)
def test_tuning_is_left_out_where_it_has_nothing_to_do(
    tiny_model: TinyModel, settings: dict[str, Any], updates: int
) -> None:
    # Steps so small that little can go wrong in them.
    given = {"early_stop": 0.0, "schedule": (0.003, 0.002, 0.001, 0.0), **settings}
    job = null_text_for(tiny_model("sdxl"), "sdxl", **given)
    _, _, trajectory, report = job.run()
    assert f" {updates} of {3 * job.inner_steps} gradient steps" in report
    untouched = torch.equal(trajectory.embeddings, job.negative[0][0].expand(3, -1, -1, -1))
    assert untouched == (updates == 0)


def test_embeddings_of_other_noise_levels_are_the_nearest(tiny_model: TinyModel) -> None:
    trajectory = inverted(tiny_model, "sdxl").trajectory
    for sigma, index in ((14.0, 0), (1.0, 0), (0.8, 0), (0.6, 1), (0.4, 1), (0.3, 2), (0.01, 2)):
        assert torch.equal(trajectory.unconditional(sigma), trajectory.embeddings[index]), sigma


# Memory


@pytest.mark.parametrize("limit", [0.0, 1e12])
def test_gradients_are_the_same_wherever_they_are_kept(pack: ModuleType, limit: float) -> None:
    gradients = pack.nodes.host.gradients
    layer = torch.nn.Linear(6, 6)
    x = torch.randn(3, 6, requires_grad=True)

    def loss() -> Tensor:
        return (layer(x).exp().softmax(1) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(), x)
    with gradients.KeptActivations(torch.device("cpu"), limit) as kept:
        value = loss()
    (found,) = torch.autograd.grad(value, x)
    assert torch.equal(found, expected)
    assert 3 * 3 * 6 * 4 <= kept.needed <= 2000


def test_weights_that_come_and_go_are_loaded_again(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As dynamic VRAM has them, which needs a graphics card."""
    job = null_text_for(tiny_model("sd15").clone(), "sd15")
    expected = inverted(tiny_model, "sd15").trajectory
    monkeypatch.setattr(job.model, "is_dynamic", lambda: True)
    assert torch.equal(job.run()[2].embeddings, expected.embeddings)
    monkeypatch.setattr(job.model, "cached_patcher_init", None)
    with pytest.raises(ValueError, match="loader that cannot load it a second time"):
        job.run()
