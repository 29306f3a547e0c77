"""Only tokens inside the mask are calculated, and they come out as if the others were there."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from host import foreign, stock
from host.edits import Edit, edit_for, latent_for, patcher_state, picture_latent, soft_ramp

TinyModel = Callable[[str], Any]
FAMILIES = ("sd3", "sd35", "flux", "schnell", "flux2")
CORNER = (3, 5)
"""Rows and columns of latent cells that are edited."""
SIZE = (13, 16)
"""Of the latents here: a row of cells is left over when tokens take two each."""


def corner(latent: Tensor) -> Tensor:
    """A hard mask over one corner."""
    mask = torch.zeros(1, *latent.shape[-2:])
    mask[:, : CORNER[0], : CORNER[1]] = 1
    return mask


def local(model: Any, name: str, **settings: Any) -> Edit:
    """An edit of a corner that calculates only what it has to."""
    latent = latent_for(name, settings.pop("batch", 1), *SIZE)
    settings = {"active_tokens": True, "mask": corner(latent), **settings}
    return edit_for(model, name, latent=latent, **settings)


@contextmanager
def sequences(model: Any) -> Iterator[list[int]]:
    """How many tokens of the picture each call's first block gets while this is open."""
    network, lengths = model.model.diffusion_model, []
    if hasattr(network, "joint_blocks"):
        watched = network.joint_blocks[0].x_block.attn.qkv
    else:
        watched = network.double_blocks[0].img_attn.qkv

    def note(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        lengths.append(args[0].shape[1])

    handle = watched.register_forward_pre_hook(note)
    try:
        yield lengths
    finally:
        handle.remove()


def patch_of(name: str) -> int:
    """Latent cells along a token's side."""
    return 1 if name == "flux2" else 2


def counts(name: str, halo: int) -> tuple[int, int]:
    """Tokens inside and of the whole picture."""
    patch = patch_of(name)
    grid = [math.ceil(side / patch) for side in SIZE]
    sides = [
        min(math.ceil(side / patch) + halo, most) for side, most in zip(CORNER, grid, strict=True)
    ]
    return math.prod(sides), math.prod(grid)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("halo", [0, 1])
def test_the_target_has_the_tokens_inside_only(tiny_model: TinyModel, name: str, halo: int) -> None:
    edit = local(tiny_model(name).clone(), name, halo=halo)
    with sequences(edit.model) as lengths:
        edited = edit.run()
    inside, whole = counts(name, halo)
    assert lengths == [whole, inside] * edit.n_max
    moved = (edited != edit.latent).any(1)[0]
    assert moved[: CORNER[0], : CORNER[1]].all()
    moved[: CORNER[0], : CORNER[1]] = False
    assert not moved.any(), "outside is the source, to the last bit"


def around(name: str) -> Tensor:
    """The tokens outside of the corner."""
    patch = patch_of(name)
    outside = torch.ones([math.ceil(side / patch) for side in SIZE], dtype=torch.bool)
    rows, columns = (math.ceil(side / patch) for side in CORNER)
    outside[:rows, :columns] = False
    return outside.flatten().nonzero()[:, 0]


def as_in_source(name: str) -> Callable[[Any, Any], Tensor]:
    """A tap's handler: the target sees the keys and values that the source had outside.

    Source and target are asked in turn, the source first.
    """
    seen: dict[tuple, tuple[Tensor, Tensor]] = {}

    def handler(attention: Any, proceed: Any) -> Tensor:
        place, call = attention.place, attention.call
        picture = around(name) + place.image.start
        parts = [(place.block, place.kind, index) for _, index in call.branches]
        k, v = attention.k.clone(), attention.v.clone()
        for row, part in enumerate(parts):
            rows = slice(row * call.rows, (row + 1) * call.rows)
            if call.sources:
                seen[part] = (k[rows][:, :, picture], v[rows][:, :, picture])
            else:
                source = seen.get(part) or seen[part[0], part[1], 0]
                k[rows, :, picture], v[rows, :, picture] = source
        return proceed(attention if call.sources else replace(attention, k=k, v=v))

    return handler


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [(1.5, 4.0), (1.0, 4.0)], ids=str)
def test_they_come_out_as_if_the_source_were_around_them(
    pack: ModuleType, tiny_model: TinyModel, name: str, guidance: tuple[float, float]
) -> None:
    """Against whole calls in which the source's keys and values are put outside."""
    given = dict(zip(("source_guidance", "target_guidance"), guidance, strict=True))
    edit = local(tiny_model(name), name, halo=0, guidance_mode="auto", **given)
    tapped = pack.nodes.host.tap.tapped(edit.model, as_in_source(name))
    expected = edit.having(model=tapped, active_tokens=False).run()
    torch.testing.assert_close(edit.run(), expected, rtol=1e-3, atol=1e-4)
    plain = edit.having(active_tokens=False).run()
    assert not torch.allclose(plain, expected, rtol=1e-2), "to these models the outside matters"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_remembered_source_is_asked_again_at_refreshes_only(
    tiny_model: TinyModel, name: str
) -> None:
    edit = local(tiny_model(name).clone(), name, refresh=2)
    inside, whole = counts(name, 1)
    with sequences(edit.model) as lengths:
        first = edit.run()
        assert lengths == [whole, inside] * 5
        lengths.clear()
        again = edit.run()
        assert lengths == [whole, inside, inside] * 2 + [whole, inside]
    assert torch.equal(first, again), "to the last bit"


def test_noises_in_several_calls_see_their_own_source(
    pack: ModuleType, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = local(tiny_model("sd3").clone(), "sd3", n_avg=5, batch=2, refresh=3)
    inside, whole = counts("sd3", 1)
    together = edit.run()
    most = iter((2, 1))
    guider = pack.nodes.host.guiding.SourceTargetGuider
    # Free memory changes while an edit runs; what is kept has the shape of its first step's calls.
    monkeypatch.setattr(guider, "draws_per_call", lambda *_: next(most))
    with sequences(edit.model) as lengths:
        edited = edit.having(model=edit.model.clone()).run()
    assert lengths == [whole, inside] * 3 * edit.n_max
    torch.testing.assert_close(edited, together, rtol=1e-4, atol=1e-5)


def test_free_steps_sample_the_whole_picture(tiny_model: TinyModel) -> None:
    edit = local(tiny_model("sd3").clone(), "sd3", n_min=2)
    inside, whole = counts("sd3", 1)
    with sequences(edit.model) as lengths:
        edit.run()
    assert lengths == [whole, inside] * 3 + [whole] * 2


def test_without_a_remembered_source_every_step_takes_it_anew(tiny_model: TinyModel) -> None:
    edit = local(tiny_model("flux"), "flux", remember_source=False, refresh=3)
    assert torch.equal(edit.run(), edit.having(remember_source=True, refresh=1).run())
    assert not torch.equal(edit.run(), edit.having(remember_source=True).run())


def test_plain_and_active_edits_share_a_memory(tiny_model: TinyModel) -> None:
    model = tiny_model("sd3")
    first = local(model.clone(), "sd3")
    for edit in (first, first.having(active_tokens=False)):
        other = edit.having(active_tokens=not edit.active_tokens)
        shared = edit.having(model=model.clone())
        shared.run()
        assert torch.equal(other.having(model=shared.model).run(), other.run())


def test_a_batch_is_calculated_where_any_of_its_masks_is(tiny_model: TinyModel) -> None:
    edit = local(tiny_model("flux").clone(), "flux", batch=2, halo=0)
    lower = corner(edit.latent).flip(1)
    both = edit.having(mask=torch.cat([edit.mask, lower]))
    with sequences(edit.model) as lengths:
        both.run()
    assert set(lengths) == {counts("flux", 0)[1], 3 * 2 + 3 * 2}


@pytest.mark.parametrize("name", ["sd3", "sd35", "schnell"])
def test_equal_branches_move_nothing_but_by_rounding(tiny_model: TinyModel, name: str) -> None:
    """Differences of guidance are none when the negative prompt is the prompt itself."""
    edit = local(tiny_model(name), name, n_max=1)
    edit = edit.having(target=edit.source, negative=edit.source)
    torch.testing.assert_close(edit.run(), edit.latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_empty_mask_moves_nothing(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    edit = local(tiny_model(name), name)
    edit = edit.having(mask=torch.zeros_like(edit.mask))
    assert torch.equal(edit.run(), edit.latent)
    assert caplog.messages.count("Pinpoint: the mask is empty, so nothing will change") == 1


def test_differential_diffusion_takes_in_nothing_outside(tiny_model: TinyModel) -> None:
    model = stock.call("DifferentialDiffusion", model=tiny_model("flux"))[0]
    sigmas = stock.call("ExponentialScheduler", steps=6, sigma_max=1.0, sigma_min=0.01)[0]
    edit = local(model, "flux", schedule=sigmas)
    for active in (False, True):
        moved = (edit.having(active_tokens=active).run() != edit.latent).any(1)[0]
        assert not moved[CORNER[0] :].any()
        assert moved[: CORNER[0], : CORNER[1]].all()


def test_what_is_kept_costs_what_is_said(
    pack: ModuleType, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD3.5 medium has a second attention in some blocks."""
    module, plans = pack.nodes.host.active_tokens, []
    planned = module.planned

    def noted(*given: Any) -> Any:
        plans.append((given, planned(*given)))
        return plans[-1][1]

    monkeypatch.setattr(module, "planned", noted)
    for name in FAMILIES:
        edit = local(tiny_model(name), name, batch=2, n_avg=2)
        edit.run()
        (model, _, _, rows, _), active = plans[-1]
        size = sum(tensor.nbytes for pair in active.kept.values() for tensor in pair)
        assert active.cost(model, rows) == size, name


def test_nothing_sticks(tiny_model: TinyModel) -> None:
    model = tiny_model("flux")
    before = patcher_state(model), edit_for(model, "flux").run()
    local(model, "flux").run()
    assert patcher_state(model) == before[0]
    assert torch.equal(edit_for(model, "flux").run(), before[1])


def plainly(edit: Edit, caplog: pytest.LogCaptureFixture) -> str:
    """The warning of an edit that has to be as without active tokens."""
    expected = edit.having(active_tokens=False).run()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(edit.run(), expected)
    return caplog.text


@pytest.mark.parametrize("name", sorted(foreign.HOOKS.keys() - {"LoRA"}))
def test_hooks_of_others_see_the_whole_picture(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = foreign.HOOKS[name](tiny_model("sd3").clone())
    said = plainly(local(model, "sd3", remember_source=False), caplog)
    assert "active_tokens is on, but the whole picture is calculated: other nodes change" in said
    assert "None" not in said


def test_patched_blocks_see_the_whole_picture(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("sd3").clone()
    block = model.get_model_object("diffusion_model.joint_blocks.0")
    model.add_object_patch("diffusion_model.joint_blocks.0", block)
    assert "(diffusion_model.joint_blocks.0)" in plainly(local(model, "sd3"), caplog)


def test_loras_are_no_hindrance(tiny_model: TinyModel) -> None:
    edit = local(foreign.lora(tiny_model("sd3").clone()), "sd3")
    with sequences(edit.model) as lengths:
        edit.run()
    assert min(lengths) == counts("sd3", 1)[0]


@pytest.mark.parametrize("name", sorted(foreign.PROMPTS))
def test_prompts_that_bring_more_than_words(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    edit = local(tiny_model("sd3"), "sd3")
    edit = edit.having(target=foreign.PROMPTS[name](edit.target))
    assert re.search("the prompts have areas, ControlNets|prompts are comb", plainly(edit, caplog))


@pytest.mark.parametrize("prompt", ["source", "target", "negative"])
def test_prompts_of_a_part_of_the_steps(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, prompt: str
) -> None:
    edit = local(tiny_model("sd3"), "sd3")
    late = stock.call(
        "ConditioningSetTimestepRange", conditioning=getattr(edit, prompt), start=0.3, end=1.0
    )[0]
    assert "parts of the steps" in plainly(edit.having(**{prompt: late}), caplog)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("wan", {}, "the model is WAN21_T2V; it works with SD3, SD3.5 and Flux"),
        ("sd3", {"mask": None}, "there is no mask: connect one"),
        ("sd3", {"method": "FlowEdit"}, "FlowEdit moves the whole picture"),
        ("sd3", {"mask": soft_ramp(picture_latent(1, *SIZE))}, "100% of the picture's tokens"),
    ],
)
def test_where_nothing_can_be_saved(
    tiny_model: TinyModel,
    caplog: pytest.LogCaptureFixture,
    name: str,
    settings: dict[str, Any],
    reason: str,
) -> None:
    edit = local(tiny_model(name), name)
    assert reason in plainly(edit.having(**settings), caplog)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {
                "attention_mask": torch.zeros(1, 12 + 56, 12 + 56),
                "attention_mask_img_shape": (7, 8),
            },
            "the prompts bring an attention mask",
        ),
        ({"reference_latents": [picture_latent()]}, "the prompts bring reference pictures"),
    ],
)
def test_prompts_with_more_tokens(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, values: dict[str, Any], reason: str
) -> None:
    edit = local(tiny_model("flux"), "flux")
    edit = edit.having(target=stock.with_values(edit.target, **values))
    assert reason in plainly(edit, caplog)


def test_too_little_memory(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = local(tiny_model("sd35").clone(), "sd35")
    monkeypatch.setattr(type(edit.model), "get_free_memory", lambda *_: 2**16)
    assert "it would keep 0 MB, and 0 MB are free" in plainly(edit, caplog)
