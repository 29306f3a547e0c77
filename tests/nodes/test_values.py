"""Inject Values against values that an override of its own reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import latent_for, picture_latent
from host.inversions import (
    FLOWS,
    Inversion,
    Values,
    inversion_for,
    recording,
    sample,
    solver,
    values_of_picture,
    velocity,
)
from host.inversions import injecting as inject
from host.recordings import LEVEL, bytes_of, recorded, source, target
from host.tapping import FAMILIES, Family, each_of

TinyModel = Callable[[str], Any]
models = pytest.mark.parametrize("name", FLOWS)


# What is injected


@models
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 0.0), ("fp16", 4e-3), ("bf16", 3e-2), ("fp8", 0.5)]
)
def test_a_pictures_own_values_change_nothing(
    tiny_model: TinyModel, name: str, precision: str, tolerance: float
) -> None:
    model = tiny_model(name)
    trajectory, x, sigma = recorded(model, name, precision=precision, tokens="image and text")
    plain = velocity(model, source(), x, sigma)
    found = velocity(inject(model, trajectory), source(), x, sigma)
    error = float((found - plain).abs().max() / plain.std())
    assert error <= tolerance
    # Rounding that is not there would be a precision that is not used.
    assert error >= tolerance / 200


@models
@pytest.mark.parametrize("tokens", ["image", "image and text"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_injection_is_a_blend_of_values(
    tiny_model: TinyModel, name: str, tokens: str, strength: float
) -> None:
    model = tiny_model(name)
    trajectory, x, sigma = recorded(model, name, tokens=tokens)
    kept, x = Values(model).read(source(), x, sigma), latent_for(name, seed=4)
    mask = torch.linspace(0, 1, x.shape[-1]).expand(1, *x.shape[-2:]).clone()
    mask[..., -3:] = 1
    injected = inject(model, trajectory, mask, strength=strength)
    place = values_of_picture(name, mask)

    def blend(number: int, values: Tensor) -> Tensor:
        if number not in place.attentions:
            return values
        weight = torch.zeros(values.shape[2], 1)
        weight[place.image, 0] = strength * (1 - place.mask)
        if tokens == "image and text":
            # The prompt's values are of no place.
            weight[: place.image.start] = weight.max()
        return (1 - weight) * values + weight * kept[number]

    found = velocity(injected, target(), x, sigma)
    expected = velocity(Values(model).changed(blend), target(), x, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - velocity(model, target(), x, sigma)).abs().max() > 0.01


@models
@pytest.mark.parametrize("tokens", ["image", "image and text"])
def test_full_and_empty_masks_and_no_strength(
    tiny_model: TinyModel, name: str, tokens: str
) -> None:
    model, latent = tiny_model(name), latent_for(name)
    trajectory, _, _ = recorded(model, name, tokens=tokens)

    def edited(model: Any) -> Tensor:
        sigmas = torch.tensor((1.0, 0.6, 0.2, 0.0))
        return sample(model, latent, solver("Euler"), sigmas=sigmas, prompt=target(), noise=4)

    plain, whole = edited(model), edited(inject(model, trajectory))
    assert (whole - plain).abs().max() > 0.1
    everywhere, nowhere = torch.ones(1, 64, 64), torch.zeros(1, 64, 64)
    assert torch.equal(edited(inject(model, trajectory, everywhere)), plain)
    assert torch.equal(edited(inject(model, trajectory, strength=0.0)), plain)
    assert torch.equal(edited(inject(model, trajectory, nowhere)), whole)


def test_each_picture_of_a_batch_has_its_own_values_and_mask(tiny_model: TinyModel) -> None:
    model, latent = tiny_model("sd3"), picture_latent(2)
    trajectory = Inversion(recording(model), latent, method="Euler").run()[2]
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    x, sigma = trajectory.latents[LEVEL].clone(), trajectory.sigmas[LEVEL]
    found = velocity(inject(model, trajectory, masks), target(), x, sigma)
    whole = velocity(inject(model, trajectory), target(), x, sigma)
    plain = velocity(model, target(), x, sigma)
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], plain[1])
    for row in range(2):
        alone = Inversion(recording(model), latent[row : row + 1], method="Euler").run()[2]
        single = velocity(inject(model, alone), target(), x[row : row + 1], sigma)
        torch.testing.assert_close(whole[row], single[0], rtol=0, atol=2e-4)
    # An edit with several noises at once has all pictures once for each.
    again = velocity(inject(model, trajectory, masks), target(), x.repeat(2, 1, 1, 1), sigma)
    torch.testing.assert_close(again, found.repeat(2, 1, 1, 1), rtol=0, atol=2e-4)


def test_values_of_one_picture_serve_a_batch(tiny_model: TinyModel) -> None:
    model = tiny_model("flux")
    trajectory, x, sigma = recorded(model, "flux")
    two = velocity(inject(model, trajectory), target(), x.repeat(2, 1, 1, 1), sigma)
    one = velocity(inject(model, trajectory), target(), x, sigma)
    torch.testing.assert_close(two, one.expand_as(two), rtol=0, atol=2e-4)


@pytest.mark.parametrize("blocks", ["double", "single", "single, double", "0%-50%"])
def test_only_the_chosen_blocks_are_changed(tiny_model: TinyModel, blocks: str) -> None:
    model = tiny_model("flux")
    everything, x, sigma = recorded(model, "flux")
    some = recorded(model, "flux", blocks=blocks)[0]
    found = velocity(inject(model, everything, blocks=blocks), target(), x, sigma)
    again = inject(model, some, blocks=blocks)
    assert torch.equal(velocity(again, target(), x, sigma), found)
    kept = Values(model).read(source(), x, sigma)
    changed = {"double": (0,), "0%-50%": (0,), "single": (1,)}.get(blocks, (0, 1))

    def write(number: int, values: Tensor) -> Tensor:
        if number not in changed:
            return values
        return torch.cat([values[:, :, :12], kept[number][:, :, 12:]], 2)

    expected = velocity(Values(model).changed(write), target(), x, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_reference_pictures_keep_their_values(tiny_model: TinyModel) -> None:
    """As Flux Kontext has them: text, picture, references."""
    model = tiny_model("flux")
    generator = torch.Generator().manual_seed(8)
    extras = {"reference_latents": [torch.randn(1, 16, 5, 8, generator=generator)]}
    told = target(**extras)
    for prompt in (source(), stock.with_values(source(), **extras)):
        job = Inversion(recording(model), source=prompt, method="Euler")
        trajectory = job.run()[2]
        x, sigma = trajectory.latents[LEVEL].clone(), trajectory.sigmas[LEVEL]
        kept = Values(model).read(prompt, x, sigma)

        def write(number: int, values: Tensor, kept: list[Tensor] = kept) -> Tensor:
            picture = slice(12, 12 + 16)
            return torch.cat([values[:, :, :12], kept[number][:, :, picture], values[:, :, 28:]], 2)

        found = velocity(inject(model, trajectory), told, x, sigma)
        expected = velocity(Values(model).changed(write), told, x, sigma)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - velocity(model, told, x, sigma)).abs().max() > 0.01


@each_of(*(name for name in FAMILIES if "reference" in name))
@pytest.mark.parametrize("tokens", ["image", "image and text"])
def test_references_and_their_texts_are_left_alone(
    tiny_model: TinyModel, family: Family, tokens: str
) -> None:
    model = tiny_model(family.model)
    prompts = [stock.with_values(family.prompt(i, i), guidance=1.0) for i in (1, 2)]
    marked = recording(model, tokens=tokens, precision="fp16")
    job = Inversion(marked, family.latent(), source=prompts[0], method="Euler")
    _, _, trajectory, report = job.run()
    kept = trajectory.values.bytes
    assert kept == bytes_of(trajectory.values)
    assert f"recorded values take {kept / 1e6:.1f} MB" in report
    job = job.having(model=recording(model, tokens=tokens))
    trajectory = job.run()[2]
    x, sigma = trajectory.latents[LEVEL].clone(), trajectory.sigmas[LEVEL]
    theirs = Values(model).read(prompts[0], x, sigma)

    def write(number: int, own: Tensor) -> Tensor:
        block, kind = family.seen[number].rsplit(" ", 1)
        if kind == "cross":
            return own
        changed = [*family.image_of(block, kind)]
        if kind == "joint" and tokens == "image and text":
            changed += family.text
        values = own.clone()
        values[:, :, changed] = theirs[number][:, :, changed]
        return values

    found = velocity(inject(model, trajectory), prompts[1], x, sigma)
    expected = velocity(Values(model).changed(write), prompts[1], x, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Of what Flux.2's picture sees, most is padding of the prompt.
    assert (found - velocity(model, prompts[1], x, sigma)).abs().max() > 3e-4


def test_a_mask_is_resized_once(
    pack: ModuleType, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = tiny_model("flux"), pack.nodes.host.values.masks
    trajectory, x, _ = recorded(model, "flux")
    real, grids = masks.resized, []

    def resized(mask: Tensor, *size: int) -> Tensor:
        grids.append(size)
        return real(mask, *size)

    monkeypatch.setattr(masks, "resized", resized)
    injected = inject(model, trajectory, torch.zeros(1, 64, 64))
    for sigma in (0.8, 0.5):
        velocity(injected, target(), x, sigma)
    assert grids == [(4, 4)]
    velocity(injected, target(), x.repeat(2, 1, 1, 1), 0.4)
    assert grids == [(4, 4)]


# When


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_injection_acts_in_its_part_of_the_steps(tiny_model: TinyModel, name: str) -> None:
    model = tiny_model(name)
    trajectory, x, _ = recorded(model, name)
    sampling = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(part)) for part in (0.3, 0.6))
    injected = inject(model, trajectory, start=0.3, end=0.6)
    whole = inject(model, trajectory)
    for sigma, acts in ((first + 1e-3, 0), (first, 1), ((first + last) / 2, 1), (last, 0)):
        found, plain, full = (velocity(m, target(), x, sigma) for m in (injected, model, whole))
        assert torch.equal(found, full if acts else plain)
        assert not torch.equal(full, plain)


def test_strength_changes_along_its_part(tiny_model: TinyModel) -> None:
    model = tiny_model("schnell")
    trajectory, x, _ = recorded(model, "schnell")
    # Schnell's sampling has no shift: the part of the steps is 1 - sigma.
    for trend, sigma, strength in (
        ("rising", 0.6, 0.8 * 0.5),
        ("falling", 0.7, 0.8 * 0.75),
        ("falling", 0.8, 0.8),
        ("rising", 0.8, 0.0),
        ("constant", 0.45, 0.8),
        ("rising", 0.4, 0.0),
    ):
        window = dict(start=0.2, end=0.6, strength=0.8)
        found = velocity(inject(model, trajectory, trend=trend, **window), target(), x, sigma)
        expected = velocity(inject(model, trajectory, strength=strength), target(), x, sigma)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_nearest_noise_level_serves(tiny_model: TinyModel) -> None:
    model = tiny_model("sd3")
    trajectory, x, _ = recorded(model, "sd3")
    # Recorded at 0.8, 0.55, 0.3 and 0.
    injected, kept = inject(model, trajectory), trajectory.latents[LEVEL].clone()
    values = Values(model).read(source(), kept, 0.8)

    def write(number: int, own: Tensor) -> Tensor:
        return torch.cat([own[:, :, :12], values[number][:, :, 12:]], 2)

    for sigma in (1.0, 0.7):
        expected = velocity(Values(model).changed(write), target(), x, sigma)
        found = velocity(injected, target(), x, sigma)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_half_a_step_more_than_was_recorded_is_forgiven(tiny_model: TinyModel) -> None:
    model = tiny_model("schnell")
    # Schnell's sampling has no shift: the part of the steps is 1 - sigma. Steps of 0.1.
    schedule = tuple(1 - i / 10 for i in range(11))
    marked = recording(model, start=0.3, end=0.6)
    way = inversion_for(marked, "schnell", schedule=schedule, method="Euler").run()[2]
    inject(model, way, start=0.26, end=0.64)
    inject(model, way, start=0.4, end=0.5)
    for part in (dict(start=0.24, end=0.6), dict(start=0.3, end=0.66), {}, dict(start=0.5)):
        with pytest.raises(ValueError, match="start and end reach outside the recorded part"):
            inject(model, way, **part)


def test_a_sampler_cannot_begin_above_a_trajectory(tiny_model: TinyModel) -> None:
    model = tiny_model("sd3")
    job = Inversion(recording(model), schedule=(0.5, 0.4, 0.3, 0.2), method="Euler")
    injected, x = inject(model, job.run()[2]), latent_for("sd3")
    for sigma in (0.54, 0.5, 0.2, 0.16):
        velocity(injected, target(), x, sigma)
    for sigma in (1.0, 0.56, 0.14):
        with pytest.raises(ValueError, match=f"noise level {sigma:.3g}, the trajectory goes from"):
            velocity(injected, target(), x, sigma)
