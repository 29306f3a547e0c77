"""Null-Text Inversion among others: devices, hooks, interrupts, and what is said and refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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
from host.null_texts import MODELS, inverted, null_text_for, predicted
from host.prompts import PromptInterrupted

TinyModel = Callable[[str], Any]

models = pytest.mark.parametrize("name", MODELS)


# Devices and precision, of which there is only one here


def prepared(text: Tensor) -> dict[str, Any]:
    """A conditioning as a guider has it."""
    import comfy.conds

    pooled = comfy.conds.CONDRegular(torch.zeros(1, 5))
    return {"uuid": 7, "model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(text), "y": pooled}}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_embedding_goes_where_the_one_was_that_it_replaces(
    pack: ModuleType, device: str, dtype: torch.dtype
) -> None:
    """ComfyUI puts prompts on different devices into calls of their own."""
    entry = prepared(torch.zeros(1, 12, 8, dtype=dtype, device=device))
    changed = pack.nodes.host.null_text.with_text(entry, torch.ones(2, 12, 8))
    before, after = (each["model_conds"]["c_crossattn"] for each in (entry, changed))
    assert (after.cond.device, after.cond.dtype) == (before.cond.device, dtype)
    assert before.process_cond(batch_size=2).can_concat(after.process_cond(batch_size=2))
    assert changed["model_conds"]["y"] is entry["model_conds"]["y"]
    assert changed["uuid"] == 7


def test_what_is_tuned_lies_where_the_latents_do(pack: ModuleType) -> None:
    """Its gradients are scaled by numbers that lie there, too."""
    tunable = pack.nodes.host.null_text.tunable
    entry = prepared(torch.ones(1, 12, 8, dtype=torch.float16))
    text = tunable(entry, torch.zeros(2, 4, 6, 5, device="meta"))
    assert (text.device.type, text.dtype, text.shape) == ("meta", torch.float32, (2, 12, 8))
    assert torch.equal(tunable(entry, torch.zeros(3, 4, 6, 5)), torch.ones(3, 12, 8))


def test_prompts_in_half_precision_are_tuned_in_full(tiny_model: TinyModel) -> None:
    job = null_text_for(tiny_model("sdxl"), "sdxl", schedule=(1.0, 0.0), inner_steps=1)
    halves = [[[text.half(), entries]] for ((text, entries),) in (job.source, job.negative)]
    job = job.having(source=halves[0], negative=halves[1], early_stop=0.0)
    noise, _, trajectory, _ = job.run()
    assert trajectory.embeddings.dtype == torch.float32
    assert (trajectory.embeddings - halves[1][0][0]).abs().max() > 1e-3
    end = job.model.model.process_latent_out(trajectory.replayed[-1])
    back = job.back(noise, job.replaying(trajectory))
    torch.testing.assert_close(back, end, rtol=0, atol=1e-4)


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
    plain = inverted(tiny_model, "sdxl").trajectory
    assert (plain.embeddings - trajectory.embeddings).abs().max() > 1e-3
    assert patcher_state(model) == state


def test_a_prompt_for_an_area_is_replayed(tiny_model: TinyModel) -> None:
    job, noise, trajectory = inverted(tiny_model, "sdxl")
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
    again = inverted(tiny_model, name).trajectory
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
    assert torch.equal(found.replayed, inverted(tiny_model, "sdxl").trajectory.replayed)


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
    refused("sigmas end at 0.25, but the picture is at 0", schedule=(1.0, 0.6, 0.25))
    refused("sigmas end at 0.25, but the picture is at 0", schedule=(0.25, 0.6, 1.0))
    refused("latent has 16 channels, the model needs 4", latent=picture_latent())
    refused("guidance is 0.5", guidance=0.5)
    refused("model passes no gradient", model=detached_attention(job.model))
    broken = foreign.after_cfg(job.model)
    broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * math.nan)
    refused("not finite at sigma 1.000", model=broken)


def test_another_guidance_is_said(tiny_model: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    job, _, trajectory = inverted(tiny_model, "sdxl")
    with caplog.at_level(logging.WARNING):
        job.replaying(trajectory)
        assert "Pinpoint" not in caplog.text
        job.having(guidance=5.0).replaying(trajectory)
        assert "were tuned for guidance 7.5, the guider has 5" in caplog.text


def test_what_cannot_be_replayed_is_refused(tiny_model: TinyModel) -> None:
    job, noise, trajectory = inverted(tiny_model, "sdxl")
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
