"""Only tokens inside the mask are calculated, and they come out as if the others were there."""

from __future__ import annotations

import logging
import math
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


@pytest.mark.parametrize("name", FAMILIES)
def test_they_come_out_as_if_the_source_were_around_them(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    """One step, against a whole call in which the source's keys and values are put outside."""
    edit = local(tiny_model(name), name, n_max=1, halo=0)
    delta = edit.run() - edit.latent
    seen: dict[tuple, tuple[Tensor, Tensor]] = {}
    shape = [math.ceil(side / patch_of(name)) for side in SIZE]
    outside = torch.ones(shape, dtype=torch.bool)
    outside[: math.ceil(CORNER[0] / patch_of(name)), : math.ceil(CORNER[1] / patch_of(name))] = (
        False
    )
    outside = outside.flatten().nonzero()[:, 0]

    def as_in_source(attention: Any, proceed: Any) -> Tensor:
        place, call = attention.place, attention.call
        key = (place.block, place.kind, tuple(index for _, index in call.branches))
        picture = outside + place.image.start
        if not seen.get(key):
            seen[key] = (attention.k[:, :, picture], attention.v[:, :, picture])
            return proceed(attention)
        k, v = attention.k.clone(), attention.v.clone()
        k[:, :, picture], v[:, :, picture] = seen[key]
        return proceed(replace(attention, k=k, v=v))

    tapped = pack.nodes.host.tap.tapped(edit.model, as_in_source)
    expected = edit.having(model=tapped, active_tokens=False, remember_source=True).run()
    torch.testing.assert_close(delta, expected - edit.latent, rtol=1e-4, atol=1e-5)
    plain = edit.having(active_tokens=False).run() - edit.latent
    assert not torch.allclose(delta, plain, rtol=1e-3), "the outside does matter to these models"


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


def test_several_noises_and_free_steps(tiny_model: TinyModel) -> None:
    edit = local(tiny_model("sd3").clone(), "sd3", n_avg=2, n_min=2, batch=2)
    inside, whole = counts("sd3", 1)
    with sequences(edit.model) as lengths:
        edited = edit.run()
    assert lengths == [whole, inside] * 3 + [whole] * 2, "free steps sample the whole picture"
    assert torch.isfinite(edited).all()


def test_a_batch_is_calculated_where_any_of_its_masks_is(tiny_model: TinyModel) -> None:
    edit = local(tiny_model("flux").clone(), "flux", batch=2, halo=0)
    lower = corner(edit.latent).flip(1)
    both = edit.having(mask=torch.cat([edit.mask, lower]))
    with sequences(edit.model) as lengths:
        both.run()
    assert set(lengths) == {counts("flux", 0)[1], 3 * 2 + 3 * 2}


def test_equal_prompts_move_nothing(tiny_model: TinyModel) -> None:
    edit = local(tiny_model("sd3"), "sd3", target_guidance=1.5)
    assert torch.equal(edit.having(target=edit.source).run(), edit.latent)


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
    assert "active_tokens is on, but the whole picture is calculated: other nodes look into" in said


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
    assert "the prompts have areas, ControlNets, hooks or several parts" in plainly(edit, caplog)


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
    assert "it would keep 0 MB and 0 MB are free" in plainly(edit, caplog)
