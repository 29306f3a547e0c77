"""Laws 5, 9 and 10 and the errors of inversion, recorded values and the Structure Sampler."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import left_half, patcher_state, picture_latent
from host.graphs import NodeGraph, Wire
from host.inprocess import Host
from host.inversions import (
    METHODS,
    Calls,
    Inversion,
    injecting,
    inversion_for,
    inversion_graph,
    recording,
    sample,
    solver,
)
from host.prompts import PromptFailed, PromptInterrupted
from host.traps import Trap, interrupt

TinyModel = Callable[[str], Any]
methods = pytest.mark.parametrize("method", METHODS)


def outputs(job: Inversion) -> tuple[Tensor, Tensor]:
    """Noise and trajectory."""
    noise, _, trajectory, _ = job.run()
    return noise.generate_noise({"samples": job.latent}), trajectory.latents


# Law 5: same seed, same picture


@methods
def test_row_i_of_a_batch_is_a_single_run_with_seed_plus_i(
    tiny_model: TinyModel, method: str
) -> None:
    latent = picture_latent(3, 6, 7)
    job = Inversion(tiny_model("sd3"), latent, method=method)
    noise, way = outputs(job)
    for row in range(3):
        one = slice(row, row + 1)
        alone = job.having(latent=latent[one], seed=job.seed + row)
        for together, single in zip((noise[one], way[:, one]), outputs(alone), strict=True):
            # Matrix products of another size add in another order.
            torch.testing.assert_close(together, single, rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 2**48 - 1, 2**64 - 1])
def test_seeds(tiny_model: TinyModel, seed: int) -> None:
    job = Inversion(tiny_model("sd3"), method="RF-Inversion", seed=seed)
    first, _ = outputs(job)
    assert torch.equal(outputs(job)[0], first)
    assert (outputs(job.having(seed=seed ^ 1))[0] - first).abs().max() > 0.1
    # The others draw nothing.
    plain = job.having(method="FireFlow")
    assert torch.equal(outputs(plain)[0], outputs(plain.having(seed=seed ^ 1))[0])


@methods
def test_generators_of_others_are_left_alone(tiny_model: TinyModel, method: str) -> None:
    job = Inversion(recording(tiny_model("sd3")), method=method, measure_round_trip=True)
    before = torch.get_rng_state(), random.getstate()
    first = outputs(job)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(outputs(job), first, strict=True))


@methods
def test_executor_gives_the_same_again_fresh_and_cached(
    host: Host, tiny_model: TinyModel, method: str
) -> None:
    job = Inversion(tiny_model("sd3"), picture_latent(2), method=method)
    graph, back = inversion_graph(job)
    widgets = graph.nodes[graph.find("PinpointInvert")]["inputs"]
    executor = host.new_executor()

    def run(kept: Any = None) -> Tensor:
        return host.execute(graph.nodes, kept).value(*back)["samples"]

    first = run(executor)
    assert torch.equal(run(executor), first)
    for name, other in (("seed", 99), ("method", "Euler"), ("gamma", 0.1)):
        before, widgets[name] = widgets[name], other
        run(executor)
        widgets[name] = before
        assert torch.equal(run(executor), first)
    assert torch.equal(run(), first)
    assert torch.equal(job.sampled(solver(method, eta=0.0)), first)


# Law 9: interrupt, error, out of memory


def run_out_of_memory() -> None:
    import comfy.model_management

    raise comfy.model_management.OOM_EXCEPTION("Allocation on device")


ENDS: dict[str, tuple[Callable[[], None], type[Exception]]] = {
    "interrupted": (interrupt, PromptInterrupted),
    "out of memory": (run_out_of_memory, PromptFailed),
}
ends = pytest.mark.parametrize(("spring", "raised"), ENDS.values(), ids=ENDS)


def fused_edit(model: Any) -> tuple[NodeGraph, Wire]:
    """Record, invert, inject and sculpt, as a graph; four steps of two calls each way."""
    graph = NodeGraph()
    latent = picture_latent()
    given = graph.give(model)
    picture, mask = graph.give({"samples": latent}), graph.give(left_half(latent))
    source, target = (graph.give(stock.conditioning(seed)) for seed in (1, 2))
    sigmas = graph.add("BasicScheduler", model=given, scheduler="simple", steps=4, denoise=1.0)
    part: dict[str, Any] = dict(blocks="all", start=0.0, end=0.5)
    recorder = graph.add(
        "PinpointRecordValues",
        **dict(model=given, **part, tokens="image and text", precision="fp16"),
        **dict(device="CPU", limit_gb=1.0),
    )
    way = graph.add(
        "PinpointInvert",
        **dict(model=recorder, source=source, latent=picture, sigmas=sigmas, method="RF-Solver"),
        **dict(guidance=1.0, gamma=0.5, seed=1, measure_round_trip=False),
    )
    memory = dict(trajectory=way.out(2), mask=mask, strength=1.0, trend="falling")
    editing = graph.add("PinpointInjectValues", model=given, **part, **memory)
    edited = graph.add(
        "SamplerCustomAdvanced",
        noise=way.out(0),
        guider=graph.add("BasicGuider", model=editing, conditioning=target),
        sampler=graph.add(
            "PinpointStructureSampler",
            **memory,
            **dict(method="RF-Solver", start=0.0, end=0.5, anchor=True),
        ),
        sigmas=sigmas,
        latent_image=picture,
    )
    return graph, graph.keep(edited)


@pytest.fixture
def recordings(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Every recording that is made."""
    made, recorder = [], pack.nodes.host.recording
    real = recorder.Recording

    def make(settings: Any) -> Any:
        recording = real(settings)
        made.append(weakref.ref(recording))
        return recording

    monkeypatch.setattr(recorder, "Recording", make)
    return made


@ends
@pytest.mark.parametrize("call", [1, 6, 10, 15])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_prompt_after_a_broken_one_is_as_if_nothing_had_been(
    host: Host,
    tiny_model: TinyModel,
    recordings: list[weakref.ref],
    name: str,
    call: int,
    spring: Callable[[], None],
    raised: type[Exception],
) -> None:
    trap, model = Trap(spring), tiny_model(name).clone()
    model.add_wrapper_with_key("apply_model", "trap", trap)
    graph, edited = fused_edit(model)
    fresh = host.execute(graph.nodes).value(*edited)["samples"]
    gc.collect()
    assert [store() for store in recordings] == [None]
    before, executor = patcher_state(model), host.new_executor()
    trap.calls_left = call
    inverting = call <= 8
    where = "PinpointInvert" if inverting else "SamplerCustomAdvanced"
    with pytest.raises(raised, match=where):
        host.execute(graph.nodes, executor)
    assert patcher_state(model) == before
    gc.collect()
    # What an inversion finished is kept in the cache, what it did not is gone.
    assert sum(store() is not None for store in recordings) == (0 if inverting else 1)
    for kept in (executor, None):
        assert torch.equal(host.execute(graph.nodes, kept).value(*edited)["samples"], fresh)


@pytest.mark.parametrize("rising", [False, True])
def test_an_interrupt_is_noticed_before_the_next_step(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, rising: bool
) -> None:
    """Also with a compiled model, in which ComfyUI cannot look for one."""
    import comfy.model_management
    import comfy.ops

    monkeypatch.setattr(comfy.ops, "run_every_op", lambda: None)
    trap, calls = Trap(interrupt), Calls(tiny_model("sd3"))
    calls.model.add_wrapper_with_key("apply_model", "trap", trap)
    sigmas = torch.tensor((0.1, 0.3, 0.6, 0.9) if rising else (0.9, 0.6, 0.3, 0.1))
    trap.calls_left = 2
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(calls.model, picture_latent(), solver("Euler"), sigmas=sigmas)
    assert len(calls.sigmas) == 2
    comfy.model_management.throw_exception_if_processing_interrupted()


def test_a_recording_lives_as_long_as_its_trajectory(
    tiny_model: TinyModel, recordings: list[weakref.ref]
) -> None:
    model = tiny_model("sd3")
    marked = recording(model)
    trajectory = Inversion(marked, measure_round_trip=True).run()[2]
    injected = injecting(model, trajectory)
    sample(injected, picture_latent(), solver("Euler"), sigmas=torch.tensor((1.0, 0.5, 0.0)))
    del trajectory
    gc.collect()
    assert recordings[0]() is not None
    del injected
    gc.collect()
    assert recordings[0]() is None
    with suppress(ValueError):
        Inversion(marked, schedule=(1.0, 0.5, 0.7)).run()
    gc.collect()
    assert not any(store() for store in recordings)


# What is refused


def refused(says: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_inversions_that_cannot_be(tiny_model: TinyModel) -> None:
    job = Inversion(tiny_model("sd3"))
    guided = job.having(guidance=2.0)
    refused(r"negative is not connected, but guidance is 2: connect", guided.run)
    unet = Inversion(tiny_model("sd15"), picture_latent(1, channels=4))
    refused("SD15, which does not predict a flow velocity", unet.run)
    refused("latent has 4 channels", job.having(latent=picture_latent(1, channels=4)).run)
    refused("guidance is nan", job.having(guidance=float("nan")).run)
    refused("method is DDIM: choose one of RF-Solver", job.having(method="DDIM").run)
    noise = stock.call("RandomNoise", noise_seed=1)[0]
    short = r"sigmas have {} steps: connect the sigmas of a scheduler with at least one"
    wrong = r"do not rise or fall between 0 and 1"
    for schedule, says in (
        ((), short.format(0)),
        ((1.0,), short.format(0)),
        ((14.6, 3.0, 0.0), wrong),
        ((1.0, 0.5, 0.7), wrong),
        ((1.0, 0.5, 0.5), wrong),
        ((1.0, float("nan"), 0.0), wrong),
        ((0.5, -0.1), wrong),
    ):
        given = job.having(schedule=schedule)
        refused(says, given.run)
        # ComfyUI does not ask a sampler to follow no sigmas.
        if schedule:
            refused(says, partial(given.sampled, solver(), noise))


def test_noise_of_another_size(tiny_model: TinyModel) -> None:
    job = Inversion(tiny_model("sd3"))
    noise = job.run()[0]
    other = job.having(latent=picture_latent(1, 8, 9))
    refused(
        r"noise was inverted from a latent of 1 x 16x8x8, latent_image is 1 x 16x8x9",
        lambda: other.sampled(solver(), noise),
    )


def test_values_that_cannot_be(tiny_model: TinyModel) -> None:
    model = tiny_model("flux")
    part = dict(blocks="double", start=0.2, end=0.5)
    job = inversion_for(recording(model, **part), "flux")
    way = job.run()[2]

    def edited(latent: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        injected = injecting(model, way, mask, **part)
        latent = job.latent if latent is None else latent
        return sample(injected, latent, solver("Euler"), sigmas=torch.tensor((0.9, 0.4, 0.0)))

    for blocks in ("single", "all"):
        says = "blocks has single 0, of which the trajectory holds no values: give Record Values"
        refused(says, partial(injecting, model, way, **{**part, "blocks": blocks}))
    for start, end in ((0.6, 0.9), (0.0, 0.1), (0.0, 1.0), (0.2, 1.0)):
        given = {**part, "start": start, "end": end}
        says = "start and end reach outside the recorded part"
        refused(says, partial(injecting, model, way, **given))
    refused("holds no attention values", lambda: injecting(model, replace(way, values=None)))
    refused("made with Flux, the model is SD3", lambda: injecting(tiny_model("sd3"), way))
    refused("start is 0.5 and end 0.5", lambda: injecting(model, way, start=0.5, end=0.5))
    refused("start is 0.5 and end 0.2", lambda: recording(model, start=0.5, end=0.2))
    refused("blocks has 'joint', which Flux has not", lambda: recording(model, blocks="joint"))
    refused("precision is int4: choose one of fp16", lambda: recording(model, precision="int4"))
    refused("mask holds values that are not", lambda: edited(mask=torch.full((1, 8, 8), torch.nan)))
    refused("values of 16 picture tokens, the model looks at 20", lambda: edited(latent_of(8, 9)))
    two = picture_latent(2)
    way = job.having(latent=two).run()[2]
    refused("values of 2 pictures, the latent has 3", lambda: edited(picture_latent(3)))
    refused("mask has 3 images, the latent 2", lambda: edited(two, torch.ones(3, 8, 8)))
    early = recording(model, start=0.0, end=0.01)
    nothing = inversion_for(early, "flux", schedule=(0.5, 0.2, 0.0))
    refused("no step of this schedule between its start and end", nothing.run)


def latent_of(*size: int) -> Tensor:
    return picture_latent(1, *size)


def test_trajectories_between_and_beyond_their_levels(tiny_model: TinyModel) -> None:
    way = Inversion(tiny_model("sd3"), schedule=(0.9, 0.5, 0.1)).run()[2]
    high, middle, low = way.latents
    between = {0.95: high, 0.9: high, 0.7: (high + middle) / 2, 0.5: middle, 0.1: low, 0.05: low}
    for sigma, expected in between.items():
        torch.testing.assert_close(way.at(sigma, like=low), expected, rtol=0, atol=1e-6)
    assert torch.equal(way.at(0.5 + 1e-9, like=low), middle)
