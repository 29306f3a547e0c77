"""Laws 6 and 9: one model call a step, and a broken prompt leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import (
    Edit,
    MaskSearch,
    edit_for,
    latent_for,
    left_half,
    patcher_state,
    picture_latent,
)
from host.inprocess import Host
from host.prompts import PromptFailed, PromptInterrupted
from host.traps import Trap, interrupt

TinyModel = Callable[[str], Any]

METHODS = ("FocusFlow", "FlowEdit", "FocusFlow as published")
methods = pytest.mark.parametrize("method", METHODS)
free_steps = pytest.mark.parametrize("n_min", [0, 2])


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
    MaskSearch(calls.model, picture_latent(2), samples=6).run()
    assert calls.rows == [6 * 2 * 2]


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
    whole = MaskSearch(calls.model, picture_latent(), samples=5).run()
    starve(monkeypatch, calls.model, 2.5)
    calls.rows.clear()
    apart = MaskSearch(calls.model, picture_latent(), samples=5).run()
    assert max(calls.rows) == 2
    assert sum(calls.rows) == 5 * 2
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
    before, executor = patcher_state(model), host.new_executor()
    trap.calls_left = call
    with pytest.raises(raised, match="SamplerCustomAdvanced"):
        host.execute(graph.nodes, executor)
    assert patcher_state(model) == before
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
    graph, mask = MaskSearch(model).graph()
    # Several calls, so that there is one in the middle.
    starve(monkeypatch, model, 1)
    fresh = host.execute(graph.nodes).value(mask.node_id)
    before = patcher_state(model)
    trap.calls_left = 3
    with pytest.raises(raised, match="PinpointVelocityMask"):
        host.execute(graph.nodes)
    assert patcher_state(model) == before
    assert torch.equal(host.execute(graph.nodes).value(mask.node_id), fresh)


@pytest.mark.parametrize("search", [False, True], ids=["edit", "mask"])
def test_an_interrupt_is_noticed_before_the_next_call(
    host: Host, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, search: bool
) -> None:
    """Also with a compiled model, in which ComfyUI cannot look for one."""
    import comfy.ops

    monkeypatch.setattr(comfy.ops, "run_every_op", lambda: None)
    trap, model = Trap(interrupt), tiny_model("sd3").clone()
    model.add_wrapper_with_key("apply_model", "trap", trap)
    starve(monkeypatch, model, 2.5)
    guidances = dict(source_guidance=1.0, target_guidance=1.0)
    graph, _ = MaskSearch(model).graph() if search else Edit(model).having(**guidances).graph()
    trap.calls_left = 2
    with pytest.raises(PromptInterrupted, match="VelocityMask" if search else "SamplerCustom"):
        host.execute(graph.nodes)
    assert trap.calls_left == 0
