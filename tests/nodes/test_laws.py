"""Laws 1, 3 and 5: nothing sticks, nothing moves unasked, the same seed gives the same picture."""

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
from host.edits import (
    Edit,
    MaskSearch,
    contents,
    edit_for,
    latent_for,
    left_half,
    patcher_state,
    picture_latent,
    soft_ramp,
)
from host.inprocess import Execution, Host

TinyModel = Callable[[str], Any]

models = pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "schnell", "wan"])
PARTS = ("SourceTargetGuider", "EditSampler")
METHODS = ("FocusFlow", "FlowEdit", "FocusFlow as published")
methods = pytest.mark.parametrize("method", METHODS)
free_steps = pytest.mark.parametrize("n_min", [0, 2])


# Law 1: nothing sticks


@models
def test_nothing_sticks_to_the_model(tiny_model: TinyModel, name: str) -> None:
    model = foreign.attention_override(foreign.wrapper("apply_model")(tiny_model(name)))
    x = latent_for(name, 2)

    def output() -> Tensor:
        return stock.velocity(model, stock.conditioning(4), stock.conditioning(5), 2.0, x, 0.6)

    before, state_before = output(), patcher_state(model)
    MaskSearch(model, x).run()
    assert torch.equal(output(), before)
    for method in METHODS:
        for n_min in (0, 2):
            edit = edit_for(model, name, method=method, n_min=n_min, mask=left_half(x))
            parts = edit.parts()
            assert torch.equal(output(), before), "by making the parts"
            stock.call("SamplerCustomAdvanced", **parts)
            assert torch.equal(output(), before), "while the used parts are alive"
    assert patcher_state(model) == state_before


@methods
def test_inputs_are_not_written_into(tiny_model: TinyModel, method: str) -> None:
    latent = picture_latent(2)
    mask, noise_mask = soft_ramp(latent).clone(), left_half(latent)
    settings = dict(method=method, n_min=2, reanchor=True, mask=mask, noise_mask=noise_mask)
    edit = Edit(tiny_model("sd3"), latent).having(**settings)
    prompts = [edit.source, edit.target, edit.negative]
    tensors = [latent, mask, noise_mask, *(prompt[0][0] for prompt in prompts if prompt)]
    kept = [tensor.clone() for tensor in tensors]
    shape = contents(prompts)
    parts = edit.parts()
    stock.call("SamplerCustomAdvanced", **parts)
    MaskSearch(edit.model, latent).run()
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
    together = MaskSearch(tiny_model("sd3"), latent).run()[0]
    apart = [MaskSearch(tiny_model("sd3"), row).run()[0] for row in latent.split(1)]
    assert torch.allclose(together, torch.cat(apart), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 2**48 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_the_noise_node_works(tiny_model: TinyModel, seed: int) -> None:
    edit = Edit(tiny_model("sd3"), picture_latent(2), seed=seed, n_max=1)
    assert torch.isfinite(edit.run()).all()
    assert not torch.equal(edit.run(), edit.having(seed=seed ^ 1).run())


def global_state() -> tuple[Any, ...]:
    legacy: Any = np.random.get_state()  # noqa: NPY002
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
    first = edit.run(), MaskSearch(edit.model, edit.latent).run()[0]
    torch.manual_seed(2)
    second = edit.run(), MaskSearch(edit.model, edit.latent).run()[0]
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
