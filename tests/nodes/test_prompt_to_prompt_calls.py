"""Prompt-to-Prompt however prompts are spread over model calls, parts and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.inversions import Calls
from host.maps import SIGMA, UNETS, Control, asked, held_on, pair_guider, prompts_of, swap
from host.tapping import FAMILIES, WORDS, Family

TinyModel = Callable[[str], Any]

some = pytest.mark.parametrize("name", ["SD1.5", "SDXL", "SD3", "Flux"])


@some
def test_only_the_positive_prompt_is_controlled(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    controlled = Control(pack, family, mapping=swap()).on(model)
    negative = stock.with_values(family.prompt(3), guidance=1.0)
    plain = asked(pack, controlled, family, x)
    if name == "Flux":
        pytest.skip("takes guidance as a number")
    found = asked(pack, controlled, family, x, negative=negative, target_guidance=4.0)
    unwanted = stock.velocity(model, negative, None, 1.0, x[0], SIGMA)
    expected = unwanted + 4.0 * (plain - unwanted)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "room"), [("SD1.5", 0.5), ("SDXL", 2.5), ("SD3", 0.5), ("SD3", 2.5), ("Flux", 0.5)]
)
def test_calls_split_by_memory_give_the_same(
    pack: ModuleType,
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    room: float,
) -> None:
    family = FAMILIES[name]
    calls, x = Calls(tiny_model(family.model)), (family.latent(1, 4), family.latent(1, 5))
    controlled = Control(pack, family, mapping=swap()).on(calls.model)
    guidances: dict[str, Any] = dict(negative=family.prompt(3), target_guidance=4.0)
    whole, count = asked(pack, controlled, family, x, **guidances), len(calls.sigmas)
    assert count == 1
    needed = controlled.model.memory_required([1, *x[0].shape[1:]]) * 1.5
    monkeypatch.setattr(type(controlled), "get_free_memory", lambda *_: needed * room)
    apart = asked(pack, controlled, family, x, **guidances)
    assert len(calls.sigmas) > 2
    torch.testing.assert_close(apart, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*UNETS, "SD3", "Flux", "Qwen-Image"])
@pytest.mark.parametrize("words", [(WORDS, 20), (24, WORDS)], ids=["longer", "shorter"])
def test_prompts_of_other_lengths(
    pack: ModuleType, tiny_model: TinyModel, name: str, words: tuple[int, int]
) -> None:
    """ComfyUI would repeat a UNet's prompts of 12 and 24 tokens to 24 in one call."""
    family = FAMILIES[name]
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    source, target = (
        stock.with_values(family.prompt(seed, tokens=count), guidance=1.0)
        for seed, count in zip((1, 2), words, strict=True)
    )
    mapping = torch.eye(*words)
    control = Control(pack, family, 1.0, 0.0, mapping=mapping, weight=torch.ones(words[1]))
    way = held_on(pack, model, x[1])
    guider = pair_guider(control.on(model), source, target, trajectory=way)
    found = stock.inside(guider, x[0], lambda g, args: g(x[0], x[0].new_full((1,), SIGMA), **args))
    expected = control.written_out(model, (target, source), x, SIGMA, words)
    torch.testing.assert_close((x[0] - found) / SIGMA, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", UNETS)
def test_prompts_that_comfyui_repeats(pack: ModuleType, tiny_model: TinyModel, name: str) -> None:
    """Beside a negative prompt of twice its length the target stands twice in its keys."""
    family = FAMILIES[name]
    calls, x = Calls(tiny_model(family.model)), (family.latent(1, 4), family.latent(1, 5))
    controlled = Control(pack, family, mapping=swap()).on(calls.model)
    plain = asked(pack, controlled, family, x)
    negative = family.prompt(3, tokens=2 * WORDS)
    found = asked(pack, controlled, family, x, negative=negative, target_guidance=4.0)
    assert [len(rows) for rows in calls.latents[1:]] == [3]
    unwanted = stock.velocity(tiny_model(family.model), negative, None, 1.0, x[0], SIGMA)
    expected = unwanted + 4.0 * (plain - unwanted)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@some
@pytest.mark.parametrize("first", [False, True])
def test_what_other_handlers_hide_stays_hidden(
    pack: ModuleType, tiny_model: TinyModel, name: str, first: bool
) -> None:
    """Whether they were put on the model before or after."""
    family, hidden = FAMILIES[name], 4
    model, x = tiny_model(family.model), (family.latent(1, 4), family.latent(1, 5))
    tap = pack.nodes.host.tap

    def hiding(model: Any) -> Any:
        def handler(attention: Any, proceed: Any) -> Tensor:
            if attention.place.text is None:
                return proceed(attention)
            mask = torch.zeros(attention.q.shape[2], attention.k.shape[2])
            mask[:, attention.place.text.start + hidden] = -torch.inf
            return proceed(replace(attention, mask=mask))

        return tap.tapped(model, handler)

    control = Control(pack, family, self_until=0.0, mapping=swap(hidden - 1))
    patched = control.on(hiding(model)) if first else hiding(control.on(model))
    found = asked(pack, patched, family, x)
    expected = control.written_out(hiding(model), prompts_of(family), x, SIGMA)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Prompts of several parts


def beside(family: Family, *seeds: int) -> stock.Conditioning:
    """Prompts for areas of the same size, one beside the other."""
    area = dict(width=32, height=56, y=0, strength=1.0)
    parts = []
    for column, seed in enumerate(seeds):
        prompt = stock.with_values(family.prompt(seed), guidance=1.0)
        given = dict(conditioning=prompt, x=32 * column, **area)
        parts += stock.call("ConditioningSetArea", **given)[0]
    return parts


@pytest.mark.parametrize("name", ["SD1.5", "SD3"])
@pytest.mark.parametrize("room", [1e6, 0.5], ids=["two calls", "four calls"])
def test_each_area_takes_from_its_own(
    pack: ModuleType,
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    room: float,
) -> None:
    """Where prompt and latent are the source's, its attention is the target's own."""
    family = FAMILIES[name]
    calls, x = Calls(tiny_model(family.model)), family.latent(1, 4)
    needed = calls.model.model.memory_required([1, *x.shape[1:]]) * 1.5
    monkeypatch.setattr(type(calls.model), "get_free_memory", lambda *_: needed * room)
    areas = slice(0, 4), slice(4, 8)
    for same, other in (areas, areas[::-1]):
        seeds = ((2, 3), (1, 3)) if other == areas[0] else ((3, 2), (3, 1))
        target, source = (beside(family, *pair) for pair in seeds)
        plain = asked(pack, calls.model, family, (x, x), (target, source))
        calls.sigmas.clear()
        model = Control(pack, family).on(calls.model)
        found = asked(pack, model, family, (x, x), (target, source))
        assert len(calls.sigmas) == (2 if room > 1 else 4)
        torch.testing.assert_close(found[..., same], plain[..., same], rtol=1e-4, atol=1e-4)
        assert (found - plain)[..., other].abs().max() > 1e-3


@pytest.mark.parametrize("room", [1e6, 2.5], ids=["two calls", "more"])
def test_all_parts_of_a_target_take_from_the_only_part_of_a_source(
    pack: ModuleType, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    family = FAMILIES["SD1.5"]
    calls, x = Calls(tiny_model("sd15")), (family.latent(1, 4), family.latent(1, 5))
    model, source = Control(pack, family, mapping=swap()).on(calls.model), family.prompt(1)
    parts = [family.prompt(seed) for seed in (2, 3, 4, 5)]
    single = [asked(pack, model, family, x, (part, source)) for part in parts]
    calls.sigmas.clear()
    needed = calls.model.model.memory_required([1, *x[0].shape[1:]]) * 1.5
    monkeypatch.setattr(type(calls.model), "get_free_memory", lambda *_: needed * room)
    found = asked(pack, model, family, x, ([part[0] for part in parts], source))
    assert (len(calls.sigmas) > 2) == (room < 4)
    torch.testing.assert_close(found, torch.stack(single).mean(0), rtol=1e-3, atol=1e-3)


def test_parts_that_do_not_belong_together_are_refused(
    pack: ModuleType, tiny_model: TinyModel
) -> None:
    family = FAMILIES["SD1.5"]
    model, x = Control(pack, family).on(tiny_model("sd15")), (family.latent(1, 4),) * 2
    with pytest.raises(ValueError, match=r"source has 2 parts and target 1, so .* same areas"):
        asked(pack, model, family, x, (family.prompt(2), beside(family, 1, 3)))
    with pytest.raises(ValueError, match=r"no attention to take: give the two .* same areas"):
        asked(pack, model, family, x, (beside(family, 2), family.prompt(1)))


@pytest.mark.parametrize(
    ("case", "waits"),
    [("one call", False), ("an area", True), ("other guidance", True)],
)
def test_the_sources_attention_is_kept_only_if_somebody_waits_for_it(
    pack: ModuleType,
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    waits: bool,
) -> None:
    family, made, values = FAMILIES["SD1.5"], [], pack.nodes.host.values
    real = values.SharedValues

    def make(*given: Any) -> Any:
        made.append(real(*given))
        return made[-1]

    monkeypatch.setattr(values, "SharedValues", make)
    model, x = tiny_model("sd15"), (family.latent(1, 4), family.latent(1, 5))
    prompts = prompts_of(family)
    if case == "an area":
        prompts = beside(family, 2), beside(family, 1)
    if case == "other guidance":
        model = foreign.after_cfg(model)
    asked(pack, Control(pack, family).on(model), family, x, prompts)
    (kept,) = (store.kept for store in made)
    assert len(kept) == (len(family.seen) if waits else 0)
