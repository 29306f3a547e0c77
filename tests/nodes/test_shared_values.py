"""Inject Values without a trajectory: the target's branch sees the source's values of the step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.edits import Edit, edit_for, latent_for, left_half, patcher_state, picture_latent
from host.inversions import (
    FLOWS,
    Calls,
    Values,
    edit_guider,
    injecting,
    sample,
    solver,
    values_of_picture,
    velocity,
)

TinyModel = Callable[[str], Any]
Velocities = tuple[Tensor, Tensor]

models = pytest.mark.parametrize("name", FLOWS)
SIGMA = 0.7


def source(tokens: int = 12) -> stock.Conditioning:
    """A prompt with the guidance number that the guider gives."""
    return stock.conditioning(1, tokens, guidance=1.0)


def target(tokens: int = 12) -> stock.Conditioning:
    """Another prompt."""
    return stock.conditioning(2, tokens, guidance=1.0)


def latents(name: str, batch: int = 1) -> Velocities:
    """The target's and the source's latent."""
    return latent_for(name, batch, seed=4), latent_for(name, batch, seed=5)


def asked(guider: Any, x: Velocities, sigma: float = SIGMA) -> Velocities:
    """Velocities of both prompts, as an edit sampler asks for them."""

    def look(guider: Any, extra_args: dict[str, Any]) -> Velocities:
        return guider.velocities(*x, sigma, extra_args)

    return stock.inside(guider, x[0], look)


def written_out(
    name: str,
    model: Any,
    prompts: tuple[stock.Conditioning, stock.Conditioning],
    x: Velocities,
    mask: Tensor,
) -> Tensor:
    """The target's velocity with the source's values outside the mask."""
    words = [prompt[0][0].shape[1] for prompt in prompts]
    places = [values_of_picture(name, mask, count) for count in words]
    kept = Values(model).read(prompts[1], x[1], SIGMA)

    def blend(number: int, values: Tensor) -> Tensor:
        if number not in places[0].attentions:
            return values
        blended, own = values.clone(), values[:, :, places[0].image]
        weight = (1 - places[0].mask)[:, None]
        blended[:, :, places[0].image] = own + weight * (kept[number][:, :, places[1].image] - own)
        return blended

    return velocity(Values(model).changed(blend), prompts[0], x[0], SIGMA)


@models
@pytest.mark.parametrize("words", [12, 20], ids=["one call", "two calls"])
def test_the_target_sees_the_sources_values(tiny_model: TinyModel, name: str, words: int) -> None:
    calls, x = Calls(tiny_model(name)), latents(name)
    mask = torch.linspace(0, 1, 8).expand(1, 8, 8)
    guider = edit_guider(injecting(calls.model, mask=mask), source(), target(words))
    found = asked(guider, x)
    # Flux.2 lengthens both prompts to the same length.
    together = words == 12 or name == "flux2"
    assert [len(rows) for rows in calls.latents] == ([2] if together else [1, 1])
    model, prompts = tiny_model(name), (target(words), source())
    expected = written_out(name, model, prompts, x, mask), velocity(model, source(), x[1], SIGMA)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    plain = asked(edit_guider(model, source(), target(words)), x)
    assert (found[0] - plain[0]).abs().max() > 0.02
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-4)


@models
def test_a_full_mask_and_no_strength_change_nothing(tiny_model: TinyModel, name: str) -> None:
    model, x = tiny_model(name), latents(name, 2)
    # Both prompts in one call, as for shared values: some CPUs round other batches otherwise.
    plain = asked(edit_guider(model, source(), target(), remember_source=False), x)
    for widgets in (dict(mask=torch.ones(1, 8, 8)), dict(strength=0.0), dict(start=0.95)):
        found = asked(edit_guider(injecting(model, **widgets), source(), target()), x)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("source_guidance", [1.0, 1.5])
def test_guided_branches_take_from_their_own_kind(
    tiny_model: TinyModel, source_guidance: float
) -> None:
    """An unguided source has no negative prompt, whose part its positive one takes."""
    model, negative, x = tiny_model("sd3"), stock.conditioning(3), latents("sd3")
    mask = left_half(x[0])
    guider = edit_guider(
        injecting(model, mask=mask), source(), target(), negative, source_guidance, 4.0
    )
    found = asked(guider, x)[0]
    lender = source() if source_guidance == 1 else negative
    wanted = written_out("sd3", model, (target(), source()), x, mask)
    unwanted = written_out("sd3", model, (negative, lender), x, mask)
    expected = unwanted + 4.0 * (wanted - unwanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("room", [0.5, 2.5])
def test_calls_split_by_memory_give_the_same(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    calls, x = Calls(tiny_model("sd3")), latents("sd3")
    guidances = (stock.conditioning(3), 1.5, 4.0)
    guider = edit_guider(injecting(calls.model), source(), target(), *guidances)
    whole, count = asked(guider, x), len(calls.sigmas)
    bytes_free = calls.model.model.memory_required([1, 16, 8, 8]) * 1.5 * room
    monkeypatch.setattr(type(calls.model), "get_free_memory", lambda _self, _device: bytes_free)
    apart = asked(guider, x)
    assert len(calls.sigmas) > 2 * count
    for one, other in zip(apart, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_areas_that_both_prompts_have(tiny_model: TinyModel) -> None:
    model, x = tiny_model("sd3"), latents("sd3")
    prompts = foreign.in_area(source()), foreign.in_area(target())
    plain = asked(edit_guider(model, *prompts), x)
    found = asked(edit_guider(injecting(model), *prompts), x)
    assert (found[0] - plain[0]).abs().max() > 0.02
    assert torch.equal(found[1], plain[1])
    with pytest.raises(ValueError, match="the same length and areas"):
        asked(edit_guider(injecting(model), source(), prompts[1]), x)


@pytest.mark.parametrize("are_hooked", [(False, True), (True, False), (True, True)])
def test_prompts_with_hooks_of_their_own(
    tiny_model: TinyModel, are_hooked: tuple[bool, bool]
) -> None:
    """ComfyUI asks for them in calls of their own, the target's first."""
    model, x = tiny_model("sd3"), latents("sd3")
    one, other = (
        foreign.with_lora(prompt) if is_hooked else prompt
        for prompt, is_hooked in zip((source(), target()), are_hooked, strict=True)
    )
    plain = asked(edit_guider(model, one, other), x)
    found = asked(edit_guider(injecting(model), one, other), x)
    assert (found[0] - plain[0]).abs().max() > 0.02
    torch.testing.assert_close(found[1], plain[1], rtol=0, atol=2e-4)


def test_two_injections_share_one_step(tiny_model: TinyModel) -> None:
    model, x = tiny_model("flux"), latents("flux")
    blockwise = injecting(injecting(model, blocks="double"), blocks="single")
    for models in ((blockwise, injecting(model)), (injecting(blockwise), injecting(model))):
        one, other = (asked(edit_guider(m, source(), target()), x) for m in models)
        assert torch.equal(one[0], other[0])


# In whole edits


@models
@pytest.mark.parametrize("n_min", [0, 2])
def test_equal_prompts_still_give_the_source(tiny_model: TinyModel, name: str, n_min: int) -> None:
    model = injecting(tiny_model(name), mask=torch.zeros(1, 8, 8))
    edit = edit_for(model, name, n_min=n_min, source_guidance=4.0, target=stock.conditioning(1))
    edit = edit.having(mask=torch.zeros(1, 8, 8) if n_min else None)
    assert torch.equal(edit.run(), edit.latent)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_edits_keep_more_and_free_steps_are_free(tiny_model: TinyModel, name: str) -> None:
    model = tiny_model(name)
    edit = edit_for(model, name, source_guidance=1.0, target_guidance=1.0)
    plain, kept = edit.run(), edit.having(model=injecting(model)).run()
    assert not torch.equal(kept, plain)
    assert (kept - edit.latent).abs().mean() < (plain - edit.latent).abs().mean()
    # Steps of the target alone have no source to take from.
    free = edit.having(n_min=edit.n_max)
    assert torch.equal(free.having(model=injecting(model)).run(), free.run())


def test_each_picture_has_its_own_mask_with_several_noises_too(tiny_model: TinyModel) -> None:
    model, latent = tiny_model("sd3"), picture_latent(2)
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    # Values are shared in a call of both prompts, so all three are to be asked like that.
    edit = Edit(model, latent, n_avg=2, n_max=1, remember_source=False)
    plain, whole, found = (
        edit.having(model=changed).run()
        for changed in (model, injecting(model), injecting(model, mask=masks))
    )
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], plain[1])
    assert not torch.equal(found, plain)


def test_only_a_guider_of_two_prompts_will_do(tiny_model: TinyModel) -> None:
    model, latent = injecting(tiny_model("sd3"), end=0.5), picture_latent()
    with pytest.raises(ValueError, match="use a Source/Target Guider"):
        sample(model, latent, solver("Euler"), sigmas=torch.tensor((1.0, 0.5, 0.0)))
    # Outside of its part of the steps it asks for nothing.
    late = torch.tensor((0.3, 0.2, 0.0))
    plain = sample(tiny_model("sd3"), latent, solver("Euler"), sigmas=late)
    assert torch.equal(sample(model, latent, solver("Euler"), sigmas=late), plain)


def test_a_sampler_that_asks_for_the_target_alone_is_said(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model, latent = tiny_model("sd3"), picture_latent()
    sigmas = torch.tensor((1.0, 0.5, 0.0))

    def run(model: Any) -> Tensor:
        guider = edit_guider(model, source(), target())
        return sample(model, latent, solver("Euler"), sigmas=sigmas, guider=guider)

    plain = run(model)
    Edit(injecting(model), n_min=2).run()
    assert "nothing was injected" not in caplog.text
    assert torch.equal(run(injecting(model)), plain)
    assert "nothing was injected: use an Edit Sampler or connect a trajectory" in caplog.text


# Nothing left, and no more taken than is needed


@pytest.fixture
def stores(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every store of shared values that is made, kept alive."""
    made, values = [], pack.nodes.host.values
    real = values.SharedValues

    def make(*given: Any) -> Any:
        made.append(real(*given))
        return made[-1]

    monkeypatch.setattr(values, "SharedValues", make)
    return made


def bytes_of(store: Any) -> int:
    return sum(values.untyped_storage().nbytes() for values in store.kept.values())


@models
def test_one_call_takes_no_memory_and_two_take_the_sources(
    tiny_model: TinyModel, stores: list[Any], name: str
) -> None:
    model, x = injecting(tiny_model(name)), latents(name)
    asked(edit_guider(model, source(), target()), x)
    assert bytes_of(stores[-1]) == 0
    if name == "flux2":
        return
    asked(edit_guider(model, source(), target(20)), x)
    place = values_of_picture(name, torch.zeros(1, 8, 8))
    width = 256 if name == "zimage" else 128
    numbers = len(place.attentions) * len(place.mask) * width
    assert bytes_of(stores[-1]) == 4 * numbers


def test_a_target_that_waits_for_another_call_gets_the_sources_values(
    tiny_model: TinyModel, stores: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is memory for two of three branches."""
    calls, x = Calls(tiny_model("sd3")), latents("sd3")
    guider = edit_guider(
        injecting(calls.model), source(), target(), stock.conditioning(3), 1.0, 4.0
    )
    whole = asked(guider, x)
    assert bytes_of(stores[-1]) == 0
    bytes_free = calls.model.model.memory_required([2, 16, 8, 8]) * 1.5 * 1.01
    monkeypatch.setattr(type(calls.model), "get_free_memory", lambda _self, _device: bytes_free)
    calls.latents.clear()
    apart = asked(guider, x)
    assert sorted(len(rows) for rows in calls.latents) == [1, 2]
    assert bytes_of(stores[-1]) > 0
    for one, other in zip(apart, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_guidance_of_other_packs_can_ask_for_the_target_again(tiny_model: TinyModel) -> None:
    """As perturbed attention guidance does, in a hook after the guider's call."""
    import comfy.samplers

    seen: list[Tensor] = []

    def again(args: dict[str, Any]) -> Tensor:
        (alone,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )
        seen.append((alone - args["denoised"]).abs().max())
        return args["denoised"]

    model = injecting(tiny_model("sd3")).clone()
    model.set_model_sampler_post_cfg_function(again)
    asked(edit_guider(model, source(), target()), latents("sd3"))
    # Both prompts are guided: the source's own call sees nothing injected either.
    assert len(seen) == 2
    assert max(seen) < 2e-4


@pytest.fixture
def shared(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Every store of shared values that is made."""
    made, values = [], pack.nodes.host.values
    real = values.SharedValues

    def make(*given: Any) -> Any:
        store = real(*given)
        made.append(weakref.ref(store))
        return store

    monkeypatch.setattr(values, "SharedValues", make)
    return made


@pytest.mark.parametrize("failing", [False, True])
def test_shared_values_go_with_their_step(
    tiny_model: TinyModel, shared: list[weakref.ref], failing: bool
) -> None:
    plain = tiny_model("sd3")
    state, count = patcher_state(plain), iter(range(100))
    model = plain.clone()

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        if failing and next(count) == 2:
            raise RuntimeError("something in another pack")
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "trap", fail)
    with suppress(RuntimeError):
        Edit(injecting(model)).run()
    gc.collect()
    assert len(shared) == (3 if failing else 5)
    assert not any(store() for store in shared)
    assert patcher_state(plain) == state
