"""The attention tap among other packs' hooks, and what it says of the model call it is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.tapping import FAMILIES, WORDS, Family, Witness, each_of, families

TinyModel = Callable[[str], Any]
Proceed = Callable[[Any], Tensor]

two_families = each_of("SD3.5-medium", "Flux")


@pytest.fixture
def tap(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.tap


def seen_through(tap: ModuleType, model: Any, witness: Witness) -> Any:
    return tap.tapped(model, tap.observing(witness))


# Among others


@pytest.mark.parametrize("name", foreign.HOOKS)
@two_families
def test_hooks_of_other_packs_act_whether_they_come_before_or_after(
    tap: ModuleType, tiny_model: TinyModel, family: Family, name: str
) -> None:
    model, hook = tiny_model(family.model), foreign.HOOKS[name]
    alone = family.velocity(hook(model))
    for order in ("before", "after"):
        witness = Witness()
        if order == "before":
            both = seen_through(tap, hook(model), witness)
        else:
            both = hook(seen_through(tap, model, witness))
        assert torch.equal(family.velocity(both), alone), order
        first, *_ = witness.calls()
        assert first.names == list(family.seen), order


@two_families
def test_replaced_blocks_of_other_packs_act_whether_they_come_before_or_after(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    def louder(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.5}

    def replaced(model: Any) -> Any:
        model = model.clone()
        model.set_model_patch_replace(louder, "dit", "double_block", 0)
        return model

    model = tiny_model(family.model)
    alone = family.velocity(replaced(model))
    assert not torch.equal(alone, family.velocity(model))
    witness = Witness()
    assert torch.equal(family.velocity(seen_through(tap, replaced(model), witness)), alone)
    assert torch.equal(family.velocity(replaced(seen_through(tap, model, witness))), alone)
    assert witness.names == [*family.seen, *family.seen]


@two_families
def test_a_wrapper_that_calls_the_model_twice_has_two_calls_tapped(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    def twice(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (executor(x, *args, **kwargs) + executor(1.1 * x, *args, **kwargs)) / 2

    model, witness = tiny_model(family.model).clone(), Witness()
    model.add_wrapper_with_key("apply_model", "another pack", twice)
    alone = family.velocity(model)
    assert torch.equal(family.velocity(seen_through(tap, model, witness)), alone)
    assert [call.names for call in witness.calls()] == [list(family.seen)] * 2


@two_families
def test_the_newest_of_two_taps_is_outermost(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    log = []

    def handler(name: str, factor: float) -> Any:
        def handle(attention: Any, proceed: Proceed) -> Tensor:
            log.append((name, attention.v.abs().mean().item()))
            return proceed(replace(attention, v=attention.v * factor))

        return handle

    model = tiny_model(family.model)
    inner = tap.tapped(model, handler("older", 0.5))
    both = tap.tapped(inner, handler("newer", 3.0))
    product = tap.tapped(model, tap.changing(lambda attention: attention.v * 1.5))
    torch.testing.assert_close(
        family.velocity(both), family.velocity(product), rtol=1e-4, atol=1e-4
    )
    assert [name for name, _ in log] == ["newer", "older"] * len(family.seen)
    assert log[1][1] == pytest.approx(3 * log[0][1], rel=1e-5)
    del log[:]
    family.velocity(inner)
    assert {name for name, _ in log} == {"older"}


# Which call it is


@families
def test_rows_of_a_branch_are_those_of_its_prompt(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    together, alone = Witness(), {}
    model, x = tiny_model(family.model), family.latent(2)
    prompts = {0: family.prompt(1), 1: family.prompt(2)}
    stock.velocity(seen_through(tap, model, together), prompts[0], prompts[1], 2.0, x, 0.6)
    for index, prompt in prompts.items():
        alone[index] = Witness()
        stock.velocity(seen_through(tap, model, alone[index]), prompt, None, 1.0, x, 0.6)
    (call,) = {id(a.call): a.call for a in together.attentions}.values()
    assert call.rows == 2
    assert call.sigma == pytest.approx(0.6)
    assert call.latent == (4, *x.shape[1:])
    # Flux.2 is given 512 tokens, whatever the prompt has.
    assert call.text_length == (512 if family.model == "flux2" else WORDS)
    assert sorted(index for _, index in call.branches) == [0, 1]
    assert len({uuid for uuid, _ in call.branches}) == 2
    for index, witness in alone.items():
        for both, one in zip(together.attentions, witness.attentions, strict=True):
            (rows,) = call.rows_of(lambda _uuid, i, index=index: i == index)
            torch.testing.assert_close(both.v[rows], one.v, rtol=1e-3, atol=1e-3)


@two_families
def test_prompts_of_two_lengths_are_two_calls(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    witness, x = Witness(), family.latent(2)
    model = seen_through(tap, tiny_model(family.model), witness)
    stock.velocity(model, family.prompt(1, tokens=5), family.prompt(2), 2.0, x, 0.6)
    calls = {call.attentions[0].call.branches[0][1]: call for call in witness.calls()}
    assert sorted(calls) == [0, 1]
    for index, length in {0: 5, 1: 12}.items():
        (first, *_), call = calls[index].attentions, calls[index].attentions[0].call
        assert calls[index].names == list(family.seen)
        assert (call.text_length, call.rows, len(call.branches)) == (length, 2, 1)
        assert (first.place.text, first.place.image.start) == (slice(0, length), length)


def test_context_windows_are_named(tap: ModuleType, tiny_model: TinyModel) -> None:
    family, witness = FAMILIES["Wan"], Witness()
    windows = foreign.node(
        "ContextWindowsManual",
        **dict(context_length=2, context_overlap=1, context_schedule="standard_static"),
        **dict(context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2),
        **dict(freenoise=False, causal_window_fix=False),
    )
    model = seen_through(tap, windows(tiny_model("wan")), witness)
    stock.velocity(model, family.prompt(1), family.prompt(2), 2.0, family.latent(), 0.6)
    calls = [call.attentions[0] for call in witness.calls()]
    assert [first.call.window for first in calls] == [(0, 1), (1, 2)]
    assert all(first.place.grid == (2, 4, 5) for first in calls)
    assert all(call.names == list(family.seen) for call in witness.calls())


@pytest.mark.parametrize(
    ("name", "node", "widgets", "left"),
    [
        ("SD3", "SkipLayerGuidanceSD3", dict(layers="0"), ["joint 1 joint"]),
        (
            *("SD3.5-medium", "SkipLayerGuidanceDiT"),
            *(dict(double_layers="1", single_layers=""), ["joint 0 joint", "joint 0 self"]),
        ),
        (
            *("Flux", "SkipLayerGuidanceDiT"),
            *(dict(double_layers="0", single_layers=""), ["single 0 joint"]),
        ),
    ],
)
def test_blocks_that_skip_layer_guidance_leaves_keep_their_names(
    tap: ModuleType, tiny_model: TinyModel, name: str, node: str, widgets: dict, left: list[str]
) -> None:
    family = FAMILIES[name]
    guided = foreign.node(node, **widgets, scale=2.0, start_percent=0.0, end_percent=1.0)
    alone = family.velocity(guided(tiny_model(family.model)))
    for install in (
        lambda model, witness: seen_through(tap, guided(model), witness),
        lambda model, witness: guided(seen_through(tap, model, witness)),
    ):
        witness = Witness()
        assert torch.equal(family.velocity(install(tiny_model(family.model), witness)), alone)
        assert [call.names for call in witness.calls()] == [list(family.seen), left]
