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

from host import foreign, stock
from host.edits import contents, left_half, patcher_state, picture_latent
from host.graphs import NodeGraph
from host.inprocess import Host
from host.inversions import Calls, inversion_for
from host.null_texts import MODELS, NullText, null_text_for
from host.prompts import PromptInterrupted

TinyModel = Callable[[str], Any]

models = pytest.mark.parametrize("name", MODELS)
samplers = pytest.mark.parametrize("sampler", ["euler", "ddim"])


def predicted(job: NullText, x: Tensor, sigma: float) -> Tensor:
    """Noise that the source prompt predicts, by ComfyUI's own guider."""
    return stock.velocity(job.model, job.source, None, 1.0, x, sigma)


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
@samplers
def test_stock_samplers_follow_the_trajectory(
    tiny_model: TinyModel, name: str, sampler: str
) -> None:
    calls = Calls(tiny_model(name))
    job = null_text_for(calls.model, name, latent=picture_latent(2, 6, 5, channels=4))
    noise, _, trajectory, _ = job.run()
    calls.latents.clear()
    back = job.back(noise, job.replaying(trajectory), sampler)
    followed = [x[: len(job.latent)] for x in calls.latents]
    torch.testing.assert_close(torch.stack(followed), trajectory.replayed[:-1], rtol=0, atol=1e-5)
    end = job.model.model.process_latent_out(trajectory.replayed[-1])
    torch.testing.assert_close(back, end, rtol=0, atol=1e-4)


@models
@pytest.mark.parametrize("kind", ["noise", "v"])
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
    job = null_text_for(tiny_model(name), name)
    noise, _, trajectory, _ = job.run()
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
    _, _, trajectory, _ = null_text_for(tiny_model("sdxl"), "sdxl").run()
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
    job = null_text_for(tiny_model("sd15").clone(), "sd15", inner_steps=1)
    expected = job.run()[2]
    monkeypatch.setattr(job.model, "is_dynamic", lambda: True)
    assert torch.equal(job.run()[2].embeddings, expected.embeddings)
    monkeypatch.setattr(job.model, "cached_patcher_init", None)
    with pytest.raises(ValueError, match="loader that cannot load it a second time"):
        job.run()


# Hooks of others


@pytest.mark.parametrize(
    "hook",
    [
        "optimized_attention_override",
        "model_function_wrapper",
        "PREDICT_NOISE",
        "CALC_COND_BATCH",
        "sampler_calc_cond_batch_function",
        "post-CFG",
        "RescaleCFG",
    ],
)
def test_hooks_of_other_packs_act_in_tuning(tiny_model: TinyModel, hook: str) -> None:
    model = foreign.HOOKS[hook](tiny_model("sdxl"))
    job = null_text_for(model, "sdxl")
    state = patcher_state(model)
    noise, _, trajectory, _ = job.run()
    end = model.model.process_latent_out(trajectory.replayed[-1])
    back = job.back(noise, job.replaying(trajectory))
    torch.testing.assert_close(back, end, rtol=0, atol=1e-3)
    plain = job.having(model=tiny_model("sdxl")).run()[2]
    assert (plain.embeddings - trajectory.embeddings).abs().max() > 1e-3
    assert patcher_state(model) == state


def test_a_prompt_for_an_area_is_replayed(tiny_model: TinyModel) -> None:
    job = null_text_for(tiny_model("sdxl"), "sdxl")
    noise, _, trajectory, _ = job.run()
    area = dict(width=16, height=48, x=0, y=0, strength=1.0)
    part = stock.call("ConditioningSetArea", conditioning=stock.conditioning(2), **area)[0]
    both = job.having(source=[*job.source, *part])
    edited = both.back(noise, both.replaying(trajectory))
    whole = job.back(noise, job.replaying(trajectory))
    moved = (edited - whole).abs().amax((0, 1, 2))
    assert torch.isfinite(edited).all()
    assert moved[0] > 0.01


# Nothing is left behind


@models
def test_nothing_sticks_to_the_model(tiny_model: TinyModel, name: str) -> None:
    job = null_text_for(tiny_model(name), name)
    x = picture_latent(1, 6, 5, channels=4, seed=8)
    before, state = predicted(job, x, 0.7), patcher_state(job.model)
    inputs = [job.latent, job.source[0][0], job.negative[0][0]]
    kept, shapes = [t.clone() for t in inputs], contents([job.source, job.negative])
    noise, _, trajectory, _ = job.run()
    job.back(noise, job.replaying(trajectory))
    assert torch.equal(predicted(job, x, 0.7), before)
    assert patcher_state(job.model) == state
    functions = [
        m.weight_function for m in job.model.model.modules() if hasattr(m, "weight_function")
    ]
    assert functions
    assert not any(functions)
    assert all(torch.equal(now, then) for now, then in zip(inputs, kept, strict=True))
    assert contents([job.source, job.negative]) == shapes
    parts = (trajectory.embeddings, trajectory.latents, trajectory.replayed)
    assert all(part.device.type == "cpu" and not part.requires_grad for part in parts)
    again = job.run()[2]
    assert torch.equal(again.embeddings, trajectory.embeddings)
    assert torch.equal(again.replayed, trajectory.replayed)


@pytest.mark.parametrize("call", [2, 5])
def test_an_interrupt_is_noticed_before_the_next_call(
    host: Host, tiny_model: TinyModel, call: int
) -> None:
    """On the way to noise, and while an embedding is tuned."""
    import comfy.model_management

    calls = Calls(tiny_model("sdxl"))

    def interrupt(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        out = executor(*args, **kwargs)
        if len(calls.sigmas) == call:
            comfy.model_management.interrupt_current_processing()
        return out

    calls.model.add_wrapper_with_key("apply_model", "trap", interrupt)
    job = null_text_for(calls.model, "sdxl")
    graph = NodeGraph()
    wires = {name: graph.give(thing) for name, thing in job.wires().items()}
    node = graph.add("PinpointNullTextInversion", **wires, **job.widgets())
    graph.keep(node.out(2))
    with pytest.raises(PromptInterrupted, match="PinpointNullTextInversion"):
        host.execute(graph.nodes)
    assert len(calls.sigmas) == call
    calls.sigmas = [0.0] * 99
    found = host.execute(graph.nodes).value(node.node_id, 2)
    assert torch.equal(found.replayed, job.run()[2].replayed)


# What the node says and shows


def test_previews_count_to_the_end(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import latent_preview

    shown = []
    monkeypatch.setattr(
        latent_preview,
        "prepare_callback",
        lambda _model, steps: lambda step, x0, _x, total: shown.append((step, steps, total, x0)),
    )
    job = null_text_for(tiny_model("sdxl"), "sdxl", early_stop=0.0)
    job.run()
    assert [step for step, *_ in shown] == list(range(12))
    assert {(steps, total) for _, steps, total, _ in shown} == {(12, 12)}
    assert all(x0.shape == job.latent.shape and not x0.requires_grad for *_, x0 in shown)


def test_the_latent_wire_keeps_what_belongs_to_it(tiny_model: TinyModel) -> None:
    job = null_text_for(tiny_model("sdxl"), "sdxl", inner_steps=0)
    latent = {"samples": job.latent, "noise_mask": left_half(job.latent), "batch_index": [4]}
    given = {**job.wires(), "latent": latent}
    wire = stock.call("PinpointNullTextInversion", **given, **job.widgets())[1]
    assert wire.keys() == {"samples", "batch_index"}
    assert latent.keys() == {"samples", "noise_mask", "batch_index"}


# What is refused


def detached_attention(model: Any) -> Any:
    clone = model.clone()

    def override(attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs).detach()

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def test_what_cannot_be_inverted_is_refused(tiny_model: TinyModel) -> None:
    job = null_text_for(tiny_model("sdxl"), "sdxl")
    flow = inversion_for(tiny_model("sd3"), "sd3")
    controlled = stock.with_values(job.source, control=object())

    def refused(says: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=says):
            job.having(**changes).run()

    refused(
        "SD3, a flow model, which needs no null-text embeddings: use Invert",
        model=flow.model,
        latent=flow.latent,
    )
    refused("negative has 2 parts: connect a single", negative=job.negative * 2)
    refused("source has a ControlNet", source=controlled)
    refused("negative has a ControlNet", negative=controlled)
    refused(r"sigmas \(1.000, 0.500, 0.700", schedule=(1.0, 0.5, 0.7))
    refused("do not rise or fall between 0 and 14.7", schedule=(80.0, 0.5, 0.0))
    refused("sigmas have 0 steps", schedule=(1.0,))
    refused("latent has 16 channels, the model needs 4", latent=picture_latent())
    refused("guidance is 0.5", guidance=0.5)
    refused("model passes no gradient", model=detached_attention(job.model))
    broken = foreign.after_cfg(job.model)
    broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * math.nan)
    refused("not finite at sigma 1.000", model=broken)


def test_what_cannot_be_replayed_is_refused(tiny_model: TinyModel) -> None:
    job = null_text_for(tiny_model("sdxl"), "sdxl", inner_steps=0)
    noise, _, trajectory, _ = job.run()
    flow = inversion_for(tiny_model("sd3"), "sd3").run()[2]
    with pytest.raises(ValueError, match="trajectory holds no unconditional embeddings"):
        job.replaying(flow)
    with pytest.raises(ValueError, match="trajectory was made with SDXL, the model is SD15"):
        null_text_for(tiny_model("sd15"), "sd15").replaying(trajectory)
    other = job.having(latent=picture_latent(1, 5, 6, channels=4))
    guider = job.replaying(trajectory)
    with pytest.raises(ValueError, match="trajectory was made from a latent of 1 x 4x6x5"):
        other.back(0, guider)
    with pytest.raises(ValueError, match="noise was inverted from a latent of 1 x 4x6x5"):
        other.back(noise, guider)
