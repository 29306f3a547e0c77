"""The laws that every node keeps: nothing sticks, nothing moves unasked, same seed same picture,
one call a step, and a failed prompt leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.edits import Edit, left_half, picture_latent, soft_ramp
from host.graphs import NodeGraph, Wire
from host.inprocess import Execution, Host
from host.prompts import PromptFailed, PromptInterrupted

TinyModel = Callable[[str], Any]

models = pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "schnell", "wan"])
PARTS = ("SourceTargetGuider", "EditSampler")
METHODS = ("FocusFlow", "FlowEdit", "FocusFlow as published")
methods = pytest.mark.parametrize("method", METHODS)
free_steps = pytest.mark.parametrize("n_min", [0, 2])


def latent_for(name: str, batch: int = 1, *size: int) -> Tensor:
    frames = (2,) if name == "wan" else ()
    return picture_latent(batch, *frames, *(size or (8, 8)))


def edit_for(model: Any, name: str, **settings: Any) -> Edit:
    """An edit in the guidance mode that a person would get."""
    return Edit(model, **{"latent": latent_for(name), "guidance_mode": "auto", **settings})


MASK_WIDGETS: dict[str, Any] = dict(
    noise_level=0.75,
    samples=3,
    guidance=4.0,
    threshold=0.3,
    softness=0.3,
    dilation=0,
    blur=3,
    seed=5,
)
MASK_PROMPTS = ("source", "target", "negative")


def velocity_mask(model: Any, latent: Tensor, **widgets: Any) -> tuple[Any, ...]:
    """The outputs of a Velocity Mask node."""
    prompts = {name: stock.conditioning(seed) for seed, name in enumerate(MASK_PROMPTS)}
    inputs = {**MASK_WIDGETS, **prompts, **widgets}
    return stock.call("PinpointVelocityMask", model=model, latent={"samples": latent}, **inputs)


def mask_graph(model: Any) -> tuple[NodeGraph, Wire]:
    """A Velocity Mask for the executor, and the wire with its soft mask."""
    graph = NodeGraph()
    things = {"model": model, "latent": {"samples": picture_latent()}}
    things |= {name: stock.conditioning(seed) for seed, name in enumerate(MASK_PROMPTS)}
    wires = {name: graph.give(thing) for name, thing in things.items()}
    return graph, graph.keep(graph.add("PinpointVelocityMask", **wires, **MASK_WIDGETS))


# Law 1: nothing sticks


def contents(thing: Any) -> Any:
    """Everything in nested containers, the leaves by identity."""
    if isinstance(thing, dict):
        return {key: contents(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [contents(value) for value in thing]
    return id(thing)


def state(model: Any) -> Any:
    """What a ModelPatcher would show of a change."""
    names = (
        "model_options",
        "patches",
        "object_patches",
        "weight_wrapper_patches",
        "wrappers",
        "callbacks",
        "injections",
        "attachments",
        "additional_models",
        "hook_patches",
        "patches_uuid",
    )
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.model.modules()]
    return {name: contents(getattr(model, name)) for name in names}, any(hooks)


@models
def test_nothing_sticks_to_the_model(tiny_model: TinyModel, name: str) -> None:
    model = foreign.attention_override(foreign.wrapper("apply_model")(tiny_model(name)))
    x = latent_for(name, 2)

    def output() -> Tensor:
        return stock.velocity(model, stock.conditioning(4), stock.conditioning(5), 2.0, x, 0.6)

    before, state_before = output(), state(model)
    velocity_mask(model, x)
    assert torch.equal(output(), before)
    for method in METHODS:
        for n_min in (0, 2):
            edit = edit_for(model, name, method=method, n_min=n_min, mask=left_half(x))
            parts = edit.parts()
            assert torch.equal(output(), before), "by making the parts"
            stock.call("SamplerCustomAdvanced", **parts)
            assert torch.equal(output(), before), "while the used parts are alive"
    assert state(model) == state_before


@methods
def test_inputs_are_not_written_into(tiny_model: TinyModel, method: str) -> None:
    latent = picture_latent(2)
    mask, noise_mask = soft_ramp(latent).clone(), left_half(latent)
    prompts = [stock.conditioning(seed) for seed in (1, 2, 3)]
    edit = Edit(
        tiny_model("sd3"),
        latent,
        method,
        n_min=2,
        reanchor=True,
        mask=mask,
        noise_mask=noise_mask,
        **dict(zip(("source", "target", "negative"), prompts, strict=True)),
    )
    tensors = [latent, mask, noise_mask, *(prompt[0][0] for prompt in prompts)]
    kept = [tensor.clone() for tensor in tensors]
    shape = contents(prompts)
    parts = edit.parts()
    stock.call("SamplerCustomAdvanced", **parts)
    velocity_mask(edit.model, latent)
    assert all(torch.equal(now, then) for now, then in zip(tensors, kept, strict=True))
    assert contents(prompts) == shape
    assert parts["latent_image"].keys() == {"samples", "noise_mask"}


# Law 3: nothing moves unasked


@models
@pytest.mark.parametrize("method", ["FocusFlow", "FlowEdit"])
@pytest.mark.parametrize("n_avg", [1, 3])
def test_equal_prompts_give_the_source_bit_for_bit(
    tiny_model: TinyModel, name: str, method: str, n_avg: int
) -> None:
    latent = latent_for(name, 2, 7, 9) * 3
    edit = edit_for(
        tiny_model(name), name, latent=latent, method=method, n_avg=n_avg, source_guidance=4.0
    )
    same = edit.having(target=stock.conditioning(1))
    assert torch.equal(same.run(), latent)
    # What tells two equal prompts apart moves the picture.
    assert not torch.equal(same.having(source_guidance=2.0).run(), latent)
    assert not torch.equal(edit.run(), latent)


@models
@free_steps
def test_an_empty_mask_gives_the_source_bit_for_bit(
    tiny_model: TinyModel, name: str, n_min: int
) -> None:
    latent = latent_for(name, 2, 7, 9)
    edit = edit_for(tiny_model(name), name, latent=latent, n_min=n_min)
    assert torch.equal(edit.having(mask=torch.zeros(1, 56, 72)).run(), latent)


@models
@free_steps
@pytest.mark.parametrize("mask", [left_half, soft_ramp])
def test_outside_the_mask_is_the_source_bit_for_bit(
    tiny_model: TinyModel, name: str, n_min: int, mask: Callable[[Tensor], Tensor]
) -> None:
    latent = latent_for(name, 2, 7, 9)
    outside = (mask(latent)[0] == 0).expand_as(latent)
    edited = edit_for(tiny_model(name), name, latent=latent, n_min=n_min, mask=mask(latent)).run()
    assert torch.equal(edited[outside], latent[outside])
    assert (edited[~outside] != latent[~outside]).float().mean() > 0.99


@models
@free_steps
@pytest.mark.parametrize("reanchor", [False, True])
def test_a_full_mask_is_no_mask_is_flowedit_bit_for_bit(
    tiny_model: TinyModel, name: str, n_min: int, reanchor: bool
) -> None:
    latent = latent_for(name, 2, 7, 9)
    edit = edit_for(tiny_model(name), name, latent=latent, n_min=n_min, n_avg=2)
    unmasked = edit.run()
    assert torch.equal(edit.having(method="FlowEdit").run(), unmasked)
    full = edit.having(mask=torch.ones(1, 56, 72), reanchor=reanchor)
    assert torch.equal(full.run(), unmasked)


# Law 5: same seed, same picture


@methods
@free_steps
def test_row_i_of_a_batch_is_a_single_run_with_seed_plus_i(
    tiny_model: TinyModel, method: str, n_min: int
) -> None:
    latent = picture_latent(5, 6, 7)
    edit = Edit(tiny_model("sd3"), latent, method, n_min=n_min, n_avg=2, mask=soft_ramp(latent))
    together = edit.run()
    for row in range(5):
        alone = edit.having(latent=latent[row : row + 1], seed=edit.seed + row).run()
        # Matrix products of another size add in another order: a few roundings of float32.
        assert torch.allclose(together[row], alone[0], rtol=0, atol=2e-4)
    assert (together[0] - edit.having(latent=latent[:1], seed=9).run()[0]).abs().max() > 0.01


def test_one_noise_serves_all_pictures_of_a_velocity_mask(tiny_model: TinyModel) -> None:
    latent = picture_latent(3, 6, 7)
    together = velocity_mask(tiny_model("sd3"), latent)[0]
    apart = [velocity_mask(tiny_model("sd3"), row)[0] for row in latent.split(1)]
    assert torch.allclose(together, torch.cat(apart), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 2**48 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_the_noise_node_works(tiny_model: TinyModel, seed: int) -> None:
    edit = Edit(tiny_model("sd3"), picture_latent(2), seed=seed, n_max=1)
    assert torch.isfinite(edit.run()).all()
    assert not torch.equal(edit.run(), edit.having(seed=seed ^ 1).run())


def global_state() -> tuple[Any, ...]:
    legacy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist()


@free_steps
def test_global_generators_are_not_touched(
    pack: ModuleType, tiny_model: TinyModel, n_min: int
) -> None:
    """Below the nodes: ComfyUI's noise node seeds torch, its preview asks Python for a name."""
    edit, locating = Edit(tiny_model("sd3"), n_min=n_min, n_avg=2), pack.nodes.host.locating
    parts = edit.parts()
    noise = torch.ones_like(edit.latent)
    before = global_state()
    with torch.inference_mode():
        parts["guider"].sample(noise, edit.latent, parts["sampler"], parts["sigmas"], seed=3)
        locating.velocity_heat(parts["guider"], edit.latent, locating.HeatSettings())
    assert global_state() == before


def test_results_do_not_depend_on_global_generators(tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("sd3"), n_min=2)
    torch.manual_seed(1)
    first = edit.run(), velocity_mask(edit.model, edit.latent)[0]
    torch.manual_seed(2)
    second = edit.run(), velocity_mask(edit.model, edit.latent)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@methods
def test_executor_gives_the_same_again_fresh_cached_and_reordered(
    host: Host, tiny_model: TinyModel, method: str
) -> None:
    latent = picture_latent(2)
    edit = Edit(tiny_model("sd3"), latent, method, n_min=1, n_avg=2, mask=soft_ramp(latent))
    expected = edit.run()
    executor = host.new_executor()
    (graph, edited), (backwards, edited_last) = edit.graph(), edit.graph(reverse=True)
    noise = graph.nodes[graph.find("RandomNoise")]["inputs"]

    def run_with(seed: int) -> Execution:
        noise["noise_seed"] = seed
        return host.execute(graph.nodes, executor)

    def edited_by(run: Execution) -> Tensor:
        return run.value(edited.node_id)["samples"]

    assert torch.equal(edited_by(run_with(edit.seed)), expected)
    again = run_with(edit.seed)
    assert edited.node_id in again.cached
    assert torch.equal(edited_by(again), expected)
    # The guider and the sampler stay in the cache, and are used with another noise and back.
    moved = run_with(edit.seed + 1)
    assert {graph.find(f"Pinpoint{part}") for part in PARTS} <= set(moved.cached)
    assert not torch.equal(edited_by(moved), expected)
    back = run_with(edit.seed)
    assert edited.node_id not in back.cached
    assert torch.equal(edited_by(back), expected)
    reordered = host.execute(backwards.nodes)
    assert torch.equal(reordered.value(edited_last.node_id)["samples"], expected)


# Law 6: one call


class Calls:
    """Counts the calls of a model and the latents in each."""

    def __init__(self, model: Any):
        self.rows: list[int] = []
        self.model = model.clone()
        self.model.add_wrapper_with_key("apply_model", "counter", self._count)

    def _count(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.rows.append(len(x))
        return executor(x, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "source_guidance", "target_guidance", "rows"),
    [
        ("sd3", 1.5, 4.0, 4),
        ("sd3", 1.0, 4.0, 3),
        ("sd3", 1.0, 1.0, 2),
        ("schnell", 1.5, 4.0, 4),
        ("wan", 1.5, 4.0, 4),
        ("flux", 1.5, 4.0, 2),
    ],
)
@methods
def test_a_step_is_one_call(
    tiny_model: TinyModel,
    name: str,
    source_guidance: float,
    target_guidance: float,
    rows: int,
    method: str,
) -> None:
    calls = Calls(tiny_model(name))
    guidances = dict(source_guidance=source_guidance, target_guidance=target_guidance)
    edit_for(
        calls.model, name, latent=latent_for(name, 3), method=method, n_avg=2, **guidances
    ).run()
    assert calls.rows == [rows * 3 * 2] * 5


def test_free_steps_ask_the_target_prompt_only(tiny_model: TinyModel) -> None:
    calls = Calls(tiny_model("sd3"))
    Edit(calls.model, n_min=3).run()
    assert calls.rows == [4, 4, 2, 2, 2]


def test_all_noises_of_a_velocity_mask_are_one_call(tiny_model: TinyModel) -> None:
    calls = Calls(tiny_model("sd3"))
    velocity_mask(calls.model, picture_latent(2), samples=6)
    assert calls.rows == [6 * 2 * 4]


def test_equal_prompts_at_equal_latents_are_asked_once(tiny_model: TinyModel) -> None:
    calls = Calls(tiny_model("sd3"))
    Edit(calls.model, target=stock.conditioning(1), target_guidance=1.5).run()
    assert calls.rows == [2] * 5


def starve(monkeypatch: pytest.MonkeyPatch, model: Any, rows: float) -> None:
    """Make ComfyUI believe that so many rows of 8x8 fit into memory."""
    room = model.model.memory_required([1, 16, 8, 8]) * 1.5 * rows
    patcher = type(model)
    monkeypatch.setattr(patcher, "get_free_memory", lambda self, device: room)  # noqa: ARG005


@methods
@free_steps
@pytest.mark.parametrize(("room", "rows"), [(0.5, 1), (2.5, 2), (3.5, 2)], ids=str)
def test_calls_split_by_memory_give_the_same(
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    n_min: int,
    room: float,
    rows: int,
) -> None:
    calls = Calls(tiny_model("sd3"))
    edit = Edit(calls.model, method=method, n_min=n_min)
    whole = edit.run()
    whole_calls = len(calls.rows)
    calls.rows.clear()
    starve(monkeypatch, calls.model, room)
    apart = edit.run()
    assert max(calls.rows) == rows
    assert len(calls.rows) > whole_calls
    # Other batch sizes add in another order.
    assert torch.allclose(apart, whole, rtol=0, atol=2e-4)


def test_a_velocity_mask_split_by_memory_is_the_same(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(tiny_model("sd3"))
    whole = velocity_mask(calls.model, picture_latent(), samples=5)
    starve(monkeypatch, calls.model, 2.5)
    calls.rows.clear()
    apart = velocity_mask(calls.model, picture_latent(), samples=5)
    assert max(calls.rows) == 2
    assert sum(calls.rows) == 5 * 4
    assert torch.allclose(apart[0], whole[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_prompts_of_other_lengths_are_asked_apart_and_give_the_same(
    tiny_model: TinyModel, name: str
) -> None:
    calls = Calls(tiny_model(name))
    edit = Edit(
        calls.model,
        latent_for(name),
        source=stock.conditioning(1, tokens=9),
        target=stock.conditioning(2, tokens=20),
    )
    found, rows = edit.run(), list(calls.rows)
    assert len(rows) > 5
    assert sum(rows) == 5 * 4
    assert torch.allclose(found, edit.written_out(), rtol=0, atol=2e-4)


# Law 9: interrupt, error, out of memory


class Trap:
    """A wrapper that springs once, in a given call of the model counted from 1."""

    def __init__(self, spring: Callable[[], None]):
        self.spring, self.calls_left = spring, 0

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.calls_left -= 1
        if self.calls_left == 0:
            self.spring()
        return executor(*args, **kwargs)


def interrupt() -> None:
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()


def fail() -> None:
    raise RuntimeError("something in another pack")


def run_out_of_memory() -> None:
    import comfy.model_management

    raise comfy.model_management.OOM_EXCEPTION("Allocation on device")


ENDS: dict[str, tuple[Callable[[], None], type[Exception]]] = {
    "interrupted": (interrupt, PromptInterrupted),
    "error": (fail, PromptFailed),
    "out of memory": (run_out_of_memory, PromptFailed),
}


@pytest.mark.parametrize(("spring", "raised"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_prompt_after_a_broken_one_is_as_if_nothing_had_been(
    host: Host,
    tiny_model: TinyModel,
    name: str,
    call: int,
    spring: Callable[[], None],
    raised: type[Exception],
) -> None:
    trap, model = Trap(spring), tiny_model(name).clone()
    model.add_wrapper_with_key("apply_model", "trap", trap)
    graph, edited = edit_for(model, name, n_min=2, mask=left_half(latent_for(name))).graph()
    fresh = host.execute(graph.nodes).value(edited.node_id)["samples"]
    before, executor = state(model), host.new_executor()
    trap.calls_left = call
    with pytest.raises(raised, match="SamplerCustomAdvanced"):
        host.execute(graph.nodes, executor)
    assert state(model) == before
    # With what the broken prompt left in the cache, and without.
    for kept in (executor, None):
        again = host.execute(graph.nodes, kept).value(edited.node_id)["samples"]
        assert torch.equal(again, fresh)


@pytest.mark.parametrize(("spring", "raised"), ENDS.values(), ids=ENDS)
def test_the_mask_after_a_broken_one_is_as_if_nothing_had_been(
    host: Host,
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    spring: Callable[[], None],
    raised: type[Exception],
) -> None:
    trap, model = Trap(spring), tiny_model("sd3").clone()
    model.add_wrapper_with_key("apply_model", "trap", trap)
    graph, mask = mask_graph(model)
    # Several calls, so that there is one in the middle.
    starve(monkeypatch, model, 1)
    fresh = host.execute(graph.nodes).value(mask.node_id)
    before = state(model)
    trap.calls_left = 3
    with pytest.raises(raised, match="PinpointVelocityMask"):
        host.execute(graph.nodes)
    assert state(model) == before
    assert torch.equal(host.execute(graph.nodes).value(mask.node_id), fresh)
