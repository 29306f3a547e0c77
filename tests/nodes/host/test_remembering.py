"""A second edit of the same picture asks the model for the target alone, and is no other for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from host import foreign, stock
from host.edits import Edit, MaskSearch, edit_for, latent_for, left_half, picture_latent

TinyModel = Callable[[str], Any]
FAMILIES = ("sd3", "flux", "wan", "qwen")


@contextmanager
def rows_asked(model: Any) -> Iterator[list[int]]:
    """How many latents each call of the network gets while this is open."""
    rows: list[int] = []

    def count(_network: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(len(args[0]))

    handle = model.model.diffusion_model.register_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def run(edit: Edit) -> tuple[Tensor, int]:
    """An edit, and how many latents the network was asked about."""
    with rows_asked(edit.model) as rows:
        return edit.run(), sum(rows)


def fresh(edit: Edit) -> Tensor:
    """The same edit with a model that remembers nothing."""
    return edit.having(model=edit.model.clone()).run()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.5, 4.0)], ids=str)
def test_a_second_edit_asks_for_the_target_only(
    tiny_model: TinyModel, name: str, guidance: tuple[float, float]
) -> None:
    model = tiny_model(name).clone()
    given = dict(zip(("source_guidance", "target_guidance"), guidance, strict=True))
    first = edit_for(model, name, latent=latent_for(name, 2), mask=None, **given)
    second = first.having(target=stock.conditioning(5), mask=left_half(first.latent))
    _, asked_first = run(first)
    edited, asked = run(second)
    assert asked == asked_first // 2
    assert torch.equal(edited, fresh(second)), "to the last bit"


def test_what_is_remembered_is_what_it_would_say_again(tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("sd3").clone(), n_avg=2, n_min=1)
    first, asked = run(edit)
    again, asked_again = run(edit)
    assert torch.equal(first, again)
    # The free step at the end samples the target alone anyway.
    assert asked - asked_again == 2 * 2 * (edit.n_max - edit.n_min)


@pytest.mark.parametrize(
    "change",
    [
        {"latent": picture_latent(seed=32)},
        {"seed": 8},
        {"source": stock.conditioning(6)},
        {"negative": stock.conditioning(6)},
        {"source_guidance": 2.0},
        {"steps": 7},
        {"n_max": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_source_is_asked_anew(tiny_model: TinyModel, change: dict[str, Any]) -> None:
    model = tiny_model("sd3").clone()
    run(Edit(model))
    other = Edit(model).having(**change)
    edited, asked = run(other)
    _, asked_fresh = run(other.having(model=model.clone()))
    assert asked == asked_fresh
    assert torch.equal(edited, fresh(other))


def test_another_lora_is_another_model(tiny_model: TinyModel) -> None:
    model = tiny_model("sd3").clone()
    run(Edit(model))
    changed = foreign.lora(model)
    edited, asked = run(Edit(changed))
    assert asked == 4 * Edit(model).n_max
    assert torch.equal(edited, fresh(Edit(changed)))


def test_nothing_is_kept_if_it_is_not_wanted(tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("sd3").clone(), remember_source=False)
    with rows_asked(edit.model) as rows:
        edit.run()
        edit.run()
    assert rows == [4] * 2 * edit.n_max, "both prompts share a call"


def test_together_or_apart_the_edit_is_the_same(tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("sd3").clone())
    together = edit.having(remember_source=False).run()
    assert (edit.run() - together).abs().max() < 1e-4


def test_the_mask_is_remembered_too(tiny_model: TinyModel) -> None:
    model = tiny_model("sd3").clone()
    search = MaskSearch(model)
    found = []
    for target in (stock.conditioning(2), stock.conditioning(5)):
        with rows_asked(model) as rows:
            search.having(target=target).run()
        found.append(sum(rows))
    assert found == [2 * search.samples, search.samples]


@pytest.mark.parametrize("kind", foreign.HOOKS)
def test_hooks_that_may_remember_themselves_are_asked_every_time(
    tiny_model: TinyModel, kind: str
) -> None:
    edit = Edit(foreign.HOOKS[kind](tiny_model("sd3").clone()))
    edited, asked = run(edit)
    again, asked_again = run(edit)
    assert torch.equal(again, edited)
    # What they do depends on the rows they get, and on nothing else.
    is_pure = kind in ("LoRA", "optimized_attention_override")
    assert asked_again == (asked // 2 if is_pure else asked)


def test_prompts_with_more_than_numbers_are_asked_every_time(
    pack: ModuleType, tiny_model: TinyModel
) -> None:
    remembering = pack.nodes.host.remembering
    assert remembering.has_content([stock.conditioning(1), None, 1.5, "text", (True, b"")])
    assert not remembering.has_content([stock.conditioning(1, control=object())])
    edit = Edit(tiny_model("sd3").clone(), source=stock.conditioning(1, note=object()))
    assert run(edit)[1] == run(edit)[1]


def test_prints_of_things_that_differ_differ(pack: ModuleType) -> None:
    digest = pack.nodes.host.remembering.digest
    zeros = torch.zeros(2, 3)
    things: list[Any] = [
        *([zeros], [zeros.T], [zeros.half()], [zeros.flatten()], [zeros, zeros]),
        *([1], [1.0], ["1"], [True], [None], [], [[]], [{}], [{"a": 1}], [{"b": 1}]),
        *(["ab", "c"], ["a", "bc"], [zeros + 1e-7], [zeros.bool()], [zeros.bfloat16()]),
    ]
    prints = [digest(thing) for thing in things]
    assert len(set(prints)) == len(things)
    assert digest([{"a": 1, "b": zeros}]) == digest([{"b": zeros.clone(), "a": 1}])


def test_the_memory_is_bounded_and_forgets_the_oldest(pack: ModuleType) -> None:
    memory = pack.nodes.host.remembering.SourceMemory(limit=1000)
    for number in range(5):
        memory.keep(bytes([number]), torch.full((100,), float(number)))
        assert memory.size <= 1000
        memory.get(bytes([0]))
    kept = [number for number in range(5) if memory.get(bytes([number])) is not None]
    assert kept == [0, 4], "what was asked for last stays"
    memory.keep(b"large", torch.zeros(1000))
    assert memory.get(b"large") is None
    assert memory.get(bytes([4])) is not None, "and nothing went for it"
    memory.keep(bytes([4]), torch.zeros(100))
    assert memory.size == 800


def test_it_goes_with_the_model(pack: ModuleType, tiny_model: TinyModel) -> None:
    model = tiny_model("sd3").clone()
    edit = Edit(model)
    edit.run()
    memory = weakref.ref(pack.nodes.host.remembering.memory_of(model))
    found = memory()
    assert found is not None
    assert found.size > 0
    del model, edit, found
    gc.collect()
    assert memory() is None
