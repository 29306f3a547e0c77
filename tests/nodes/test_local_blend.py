"""Prompt-to-Prompt's local blend: where the picture may change, and what it is elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from host import foreign
from host.maps import Control
from host.pairs import guider_of, noise_of, sampled, stock_guider, trajectory_of, words_at
from host.tapping import FAMILIES, WORDS

TinyModel = Callable[[str], Any]

some = pytest.mark.parametrize("name", ["SD1.5", "SDXL", "SD3", "Flux"])


# A tiny SDXL has 2x3 tokens at this size, all of which are beside the hottest.
@pytest.mark.parametrize("name", ["SD1.5", "SD3", "Flux"])
def test_outside_of_the_words_an_inverted_source_keeps_its_bits(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(1)
    way, changed = trajectory_of(pack, model, latent), []
    for threshold in (0.0, 0.995, 1.0):
        control = Control(pack, family, 0.0, 0.0, blend=words_at(4), threshold=threshold)
        guider = guider_of(control.on(model), family, trajectory=way)
        edited = sampled(guider, latent, noise=noise_of(pack, way))
        same = (edited == latent).all(1)
        changed.append(float((~same).float().mean()))
        assert torch.equal(edited[:, :, same[0]], latent[:, :, same[0]])
    assert changed[0] == 1
    assert 0 < changed[1] < 1
    assert changed[2] == 0


@pytest.mark.parametrize("name", ["SD1.5", "SD3"])
def test_a_source_is_put_only_where_it_belongs(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    """Not into a latent that has noise left, not where the blend did not hold, nor another one."""
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(1)
    way, sampling = trajectory_of(pack, model, latent), model.get_model_object("model_sampling")
    noise, sigmas = noise_of(pack, way), torch.tensor(way.sigmas)
    out = model.model.process_latent_out

    def guider(**blend: Any) -> Any:
        control = Control(pack, family, 0.0, 0.0, **blend)
        return guider_of(control.on(model), family, trajectory=way)

    held = dict(blend=words_at(4), threshold=1.0)
    found = sampled(guider(**held), latent, noise=noise, sigmas=sigmas[:-1])
    expected = out(sampling.inverse_noise_scaling(sigmas[-2], way.latents[-2].clone()))
    # ComfyUI starts whole schedules with a little more noise.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    found = sampled(guider(**held, blend_sigma=0.0), latent, noise=noise)
    assert torch.equal(found, sampled(guider(), latent, noise=noise))
    found = sampled(guider(**held), out(way.latents[0]), noise=noise)
    torch.testing.assert_close(found, latent, rtol=1e-4, atol=1e-4)


@some
def test_outside_of_the_words_the_source_arises(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    family = FAMILIES[name]
    model, latent = tiny_model(family.model), family.latent(1)
    source = sampled(stock_guider(model, family, 1), latent)
    control = Control(pack, family, 0.0, 0.0, blend=words_at(4), threshold=1.0)
    found = sampled(guider_of(control.on(model), family), latent)
    torch.testing.assert_close(found, source, rtol=1e-3, atol=2e-3 * float(source.std()))


def test_the_area_is_where_both_prompts_look(pack: ModuleType, tiny_model: TinyModel) -> None:
    """The maps of all blocks on the grid, mean over heads, summed up over the run."""
    family = FAMILIES["SD3"]
    model, latent = tiny_model("sd3"), family.latent(1)
    blend = (words_at(4)[0], torch.zeros(WORDS))
    control = Control(pack, family, 0.0, 0.0, blend=blend, threshold=0.8)
    guider = guider_of(control.on(model), family)
    sampled(guider, latent)
    ((grid, summed),) = guider.blend.heat.sums.items()
    source, target = summed.means()
    assert grid == (1, 4, 5)
    assert summed.times.tolist() == [2 * 5]
    assert not target.any()
    assert float(source.sum()) > 0
    expected = pack.kernels.prompt_to_prompt.word_area(source.view(1, *grid), (7, 9), 0.8)
    assert torch.equal(guider.blend.area, expected)


def part_of_a_film(
    pack: ModuleType, frames: int, size: tuple[int, int], window: tuple[int, ...] | None, dim: int
) -> tuple[Any, Any]:
    """A model call for some frames, and where its only block lies."""
    host = pack.nodes.host
    options = {"context_window": SimpleNamespace(dim=dim)}
    call = host.tap.ModelCall((1, 16, frames, *size), [], None, 1.0, window, options)
    block, tokens = host.layouts.Block("layer", 0), slice(0, 4 * frames)
    return call, host.layouts.Place(block, "cross", tokens, slice(0, 12), (frames, 2, 2))


def test_heat_of_context_windows_is_put_at_their_frames(pack: ModuleType) -> None:
    """Frames of several windows have the mean; what a window is shown as a beginning is none's."""
    heat = pack.nodes.host.prompt_to_prompt.BlendHeat((4, 4, 4))
    for window, first in (((0, 1), 1.0), ((1, 2), 3.0), ((3,), 7.0)):
        # Before the frame of the last window there is one more.
        frames = 2
        call, place = part_of_a_film(pack, frames, (4, 4), window, 2)
        seen = torch.tensor([[first] * 4 + [first + 1] * 4])
        heat.add(call, place, seen, 10 * seen)
    ((grid, summed),) = heat.sums.items()
    source, target = summed.means()
    assert grid == (4, 2, 2)
    assert source[0, :, 0].tolist() == [1, 2.5, 4, 8]
    assert torch.equal(target, 10 * source)
    assert heat.area(0.9)[0, 0].any(-1).any(-1).tolist() == [False, False, False, True]


def test_heat_that_has_no_place_is_refused(pack: ModuleType) -> None:
    heat, seen = pack.nodes.host.prompt_to_prompt.BlendHeat((4, 4, 4)), torch.ones(1, 8)
    for size, window, dim, says in (
        ((4, 3), None, 2, "one of the guider's has an area: take the area out"),
        ((4, 3), (0, 1, 2), 4, "set their dim to 2"),
        ((4, 4), (0, 1, 2), 2, "set their dim to 2"),
    ):
        call, place = part_of_a_film(pack, 2, size, window, dim)
        with pytest.raises(ValueError, match=says):
            heat.add(call, place, seen, seen)


def test_films_in_windows_have_one_area(pack: ModuleType, tiny_model: TinyModel) -> None:
    family = FAMILIES["Wan"]
    settings = dict(context_length=2, context_overlap=1, context_schedule="standard_static")
    settings |= dict(context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2)
    settings |= dict(freenoise=False, causal_window_fix=True)
    model = foreign.node("ContextWindowsManual", **settings)(tiny_model("wan"))
    control = Control(pack, family, 0.0, 0.0, blend=words_at(4), threshold=0.8)
    guider = guider_of(control.on(model), family)
    sampled(guider, family.latent(1), sigmas=torch.tensor([1.0, 0.5, 0.0]))
    ((grid, summed),) = guider.blend.heat.sums.items()
    assert grid == (3, 4, 5)
    # Two blocks and two steps; the middle frame is in both windows.
    assert summed.times.tolist() == [4, 8, 4]
    assert guider.blend.area.shape == (1, 1, 3, 7, 9)
