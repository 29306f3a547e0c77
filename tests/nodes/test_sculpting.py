"""Structure Sampler against its loop written out, and the one-node edit against its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import latent_for, left_half, soft_ramp
from host.inversions import (
    FLOWS,
    Calls,
    edit_guider,
    euler,
    injecting,
    inversion_for,
    recording,
    sample,
    solver,
    structure,
    values_of_picture,
    velocity,
)

TinyModel = Callable[[str], Any]
models = pytest.mark.parametrize("name", FLOWS)
SCHEDULE = (1.0, 0.8, 0.55, 0.3, 0.1, 0.0)
PARTLY = (0.8, 0.55, 0.3, 0.1, 0.0)


def target() -> stock.Conditioning:
    return stock.conditioning(2, guidance=1.0)


def source() -> stock.Conditioning:
    return stock.conditioning(1, guidance=1.0)


class Sculpture:
    """An inverted latent, and what a Structure Sampler makes of it."""

    def __init__(self, model: Any, name: str, schedule: tuple[float, ...] = SCHEDULE):
        self.model = model
        latent = latent_for(name, 2, 6, 8)
        self.job = inversion_for(model, name, latent=latent, method="Euler", schedule=schedule)
        self.noise, _, self.way, _ = self.job.run()

    @property
    def latent(self) -> Tensor:
        return self.job.latent

    def edited(
        self, mask: Tensor, *, model: Any = None, two_prompts: bool = True, **widgets: Any
    ) -> Tensor:
        """The latent that the target prompt makes of it."""
        return self.sampled(structure(self.way, mask, **widgets), model, two_prompts)

    def sampled(self, sampler: Any, model: Any = None, two_prompts: bool = True) -> Tensor:
        """The target prompt sampled from the inverted noise by any sampler."""
        model = model or self.model
        guider = edit_guider(model, source(), target()) if two_prompts else None
        settings = dict(prompt=target(), sigmas=self.job.sigmas, noise=self.noise, guider=guider)
        return sample(model, self.latent, sampler, **settings)

    def written_out(
        self, mask: Tensor, strengths: tuple[float, ...], velocity: Callable[..., Tensor]
    ) -> Tensor:
        """Euler's steps, before each `z <- M z + (1 - M) z_inverted`; strengths step by step."""
        z, schedule = self.way.latents[0].clone(), self.job.schedule
        for (s, n), strength, inverted in zip(
            pairwise(schedule), strengths, self.way.latents[:-1], strict=True
        ):
            z = z + strength * (1 - mask) * (inverted - z)
            z = z + (n - s) * velocity(z, s)
        return self.model.model.process_latent_out(z)


# What it is at its ends


@models
@pytest.mark.parametrize("method", ["Euler", "FireFlow"])
def test_a_full_mask_is_plain_sampling_bit_for_bit(
    tiny_model: TinyModel, name: str, method: str
) -> None:
    sculpture = Sculpture(tiny_model(name), name)
    plain = sculpture.sampled(solver(method, eta=0.0))
    found = sculpture.edited(torch.ones(1, 64, 64), method=method, end=1.0)
    assert torch.equal(found, plain)
    off = sculpture.edited(torch.zeros(1, 64, 64), method=method, strength=0.0, anchor=False)
    assert torch.equal(off, plain)
    assert (plain - sculpture.latent).abs().max() > 0.1


@models
def test_an_empty_mask_is_the_source(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    sculpture, nothing = Sculpture(tiny_model(name), name), torch.zeros(1, 64, 64)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sculpture.edited(nothing), sculpture.latent)
    assert "the mask is empty" in caplog.text
    # ComfyUI's own guiders round on the way into the model's space and back.
    found = sculpture.edited(nothing, two_prompts=False)
    torch.testing.assert_close(found, sculpture.latent, rtol=0, atol=2e-6)
    # Without the anchor its last steps are free.
    caplog.clear()
    assert not torch.equal(sculpture.edited(nothing, anchor=False), sculpture.latent)
    assert "the mask is empty" not in caplog.text


@models
@pytest.mark.parametrize("shape", [left_half, soft_ramp])
@pytest.mark.parametrize("schedule", [SCHEDULE, PARTLY], ids=["whole", "partly"])
def test_outside_is_the_source_bit_for_bit(
    tiny_model: TinyModel, name: str, shape: Callable[[Tensor], Tensor], schedule: tuple[float, ...]
) -> None:
    sculpture = Sculpture(tiny_model(name), name, schedule)
    mask = shape(sculpture.latent)
    found = sculpture.edited(mask)
    outside = (mask[0] == 0).expand_as(found)
    assert torch.equal(found[outside], sculpture.latent[outside])
    assert (found[~outside] != sculpture.latent[~outside]).float().mean() > 0.99


@models
@pytest.mark.parametrize("schedule", [SCHEDULE, PARTLY], ids=["whole", "partly"])
def test_outside_follows_the_trajectory(
    tiny_model: TinyModel, name: str, schedule: tuple[float, ...]
) -> None:
    calls = Calls(tiny_model(name))
    sculpture = Sculpture(calls.model, name, schedule)
    mask = left_half(sculpture.latent)
    outside = (mask[0] == 0).expand_as(sculpture.latent)
    for strength in (1.0, 0.25):
        calls.latents.clear()
        sculpture.edited(mask, end=1.0, strength=strength, anchor=False)
        assert len(calls.latents) == len(schedule) - 1
        for seen, inverted in zip(calls.latents, sculpture.way.latents[:-1], strict=True):
            if strength == 1:
                assert torch.equal(seen[outside], inverted[outside])
        moved = calls.latents[-1][~outside] - sculpture.way.latents[-2][~outside]
        assert moved.abs().max() > 0.1


# What it is in between


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
@pytest.mark.parametrize(
    ("widgets", "strengths"),
    [
        (dict(end=1.0), (1.0,) * 5),
        (dict(end=0.5), (1.0, 1.0, 1.0, 0.0, 0.0)),
        (dict(start=0.2, end=0.6, strength=0.7), (0.0, 0.7, 0.7, 0.0, 0.0)),
        (dict(end=1.0, strength=0.5, trend="falling"), (0.5, 0.4, 0.3, 0.2, 0.1)),
        (dict(end=1.0, strength=0.5, trend="rising"), (0.0, 0.1, 0.2, 0.3, 0.4)),
        (dict(start=0.5, end=0.5), (0.0,) * 5),
    ],
    ids=["all steps", "half", "a window", "falling", "rising", "none"],
)
@pytest.mark.parametrize("anchor", [False, True])
def test_the_loop_written_out(
    tiny_model: TinyModel,
    name: str,
    widgets: dict[str, Any],
    strengths: tuple[float, ...],
    anchor: bool,
) -> None:
    sculpture = Sculpture(tiny_model(name), name)
    mask = soft_ramp(sculpture.latent)
    found = sculpture.edited(mask, anchor=anchor, **widgets)

    def asked(z: Tensor, sigma: float) -> Tensor:
        return velocity(sculpture.model, target(), z, sigma)

    expected = sculpture.written_out(mask, strengths, asked)
    if anchor:
        expected = mask * expected + (1 - mask) * sculpture.latent
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_structure_and_detail_together(tiny_model: TinyModel, name: str) -> None:
    """Both fusions written out, with values read and written by an override of its own."""
    from host.inversions import Values

    model = tiny_model(name)
    sculpture = Sculpture(recording(model), name)
    mask = soft_ramp(sculpture.latent)
    place = values_of_picture(name, mask)
    # Euler's inversion asks at all levels but the first; the second one is the nearest to it.
    levels = sculpture.job.schedule
    kept = {
        sigma: Values(model).read(source(), sculpture.way.latents[i].clone(), max(sigma, 1e-3))
        for i, sigma in enumerate(levels)
        if i > 0
    }

    def asked(z: Tensor, sigma: float) -> Tensor:
        recorded = kept[min(kept, key=lambda level: abs(level - sigma))]

        def blend(number: int, values: Tensor) -> Tensor:
            fused = values.clone()
            own, weight = values[:, :, place.image], (1 - place.mask)[:, None]
            fused[:, :, place.image] = own + weight * (recorded[number][:, :, place.image] - own)
            return fused

        changed = Values(model).changed(blend) if sigma > 0.3 else model
        return velocity(changed, target(), z, sigma)

    sampling = model.get_model_object("model_sampling")
    ends = [p / 100 for p in range(101) if sampling.percent_to_sigma(p / 100) >= 0.3]
    injected = injecting(model, sculpture.way, mask, end=ends[-1])
    found = sculpture.edited(mask, model=injected, end=0.5, anchor=False)
    expected = sculpture.written_out(mask, (1.0, 1.0, 1.0, 0.0, 0.0), asked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - sculpture.edited(mask, anchor=False)).abs().max() > 0.01


def test_another_schedule_takes_latents_between_those_of_the_trajectory(
    tiny_model: TinyModel,
) -> None:
    calls = Calls(tiny_model("sd3"))
    sculpture = Sculpture(calls.model, "sd3", (0.9, 0.5, 0.1))
    sculpture.job = sculpture.job.having(schedule=(0.9, 0.7, 0.2, 0.1, 0.0))
    calls.latents.clear()
    sculpture.edited(torch.zeros(1, 6, 8), end=1.0)
    high, middle, low = sculpture.way.latents
    between = [high, (high + middle) / 2, low + (middle - low) / 4, low]
    for seen, expected in zip(calls.latents, between, strict=True):
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", [(1.0, 0.5, 0.0), (0.9, 0.5, 0.05, 0.0)])
def test_noise_levels_that_the_trajectory_never_had_are_refused(
    tiny_model: TinyModel, schedule: tuple[float, ...]
) -> None:
    sculpture = Sculpture(tiny_model("sd3"), "sd3", (0.9, 0.5, 0.1))
    sculpture.job = sculpture.job.having(schedule=schedule)
    with pytest.raises(ValueError, match=r"the trajectory has 0\.9 to 0\.1: invert with the sig"):
        sculpture.edited(torch.zeros(1, 6, 8))


@models
def test_an_edit_in_two_stages_is_anchored_to_the_trajectory_between_them(
    tiny_model: TinyModel, name: str
) -> None:
    sculpture = Sculpture(tiny_model(name), name)
    mask = left_half(sculpture.latent)
    first = structure(sculpture.way, mask)
    settings = dict(prompt=target(), noise=sculpture.noise, sigmas=torch.tensor(SCHEDULE[:4]))
    handed_on = sample(sculpture.model, sculpture.latent, first, **settings)
    model = sculpture.model.model
    # What the next sampler starts from, as it undoes ComfyUI's scaling.
    last = SCHEDULE[3]
    found = (1 - last) * model.process_latent_in(handed_on)
    outside = (mask[0] == 0).expand_as(found)
    torch.testing.assert_close(
        found[outside], sculpture.way.latents[3][outside], rtol=1e-5, atol=1e-5
    )


def test_rf_inversions_pull_does_not_reach_into_the_mask(tiny_model: TinyModel) -> None:
    sculpture, everywhere = Sculpture(tiny_model("sd3"), "sd3"), torch.ones(1, 6, 8)
    pulled = sculpture.edited(everywhere, method="RF-Inversion")
    assert torch.equal(pulled, sculpture.edited(everywhere, method="Euler"))


def test_structure_without_steps_is_said(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    sculpture = Sculpture(tiny_model("sd3"), "sd3")
    with caplog.at_level(logging.WARNING):
        structure(sculpture.way, torch.ones(1, 6, 8), start=0.5, end=0.5)
    assert "no latents are fused" in caplog.text


def test_noise_masks_are_honoured(tiny_model: TinyModel) -> None:
    sculpture = Sculpture(tiny_model("sd3"), "sd3")
    everywhere = structure(sculpture.way, torch.ones(1, 6, 8), anchor=False)
    settings = dict(sigmas=sculpture.job.sigmas, noise=sculpture.noise, prompt=target())
    settings["noise_mask"] = left_half(sculpture.latent)
    found = sample(sculpture.model, sculpture.latent, everywhere, **settings)
    expected = sample(sculpture.model, sculpture.latent, euler(), **settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# What it refuses


def test_what_does_not_fit_is_refused(tiny_model: TinyModel) -> None:
    sculpture = Sculpture(tiny_model("sd3"), "sd3")
    mask = torch.ones(1, 8, 8)
    sampler = structure(sculpture.way, mask)
    plain = dict(sigmas=torch.tensor(SCHEDULE))

    def refused(says: str, model: Any, latent: Tensor, sampler: Any, **settings: Any) -> None:
        with pytest.raises(ValueError, match=says):
            sample(model, latent, sampler, **{**plain, **settings})

    model, latent = sculpture.model, sculpture.latent
    wide = r"made from a latent of 2 x 16x6x8, the sampler has 2 x 16x6x7: connect the latent"
    refused(wide, model, latent[..., :7], sampler)
    refused(r"2 x 16x6x8, the sampler has 1 x 16x6x8", model, latent[:1], sampler)
    refused("made with SD3, the model is FluxSchnell", tiny_model("schnell"), latent, sampler)
    rising = torch.tensor(SCHEDULE[::-1])
    refused("sigmas rise, which would invert", model, latent, sampler, sigmas=rising)
    many = structure(sculpture.way, torch.ones(3, 8, 8))
    refused("mask has 3 images, the latent 2", model, latent, many)
    with pytest.raises(ValueError, match="mask holds values that are not finite"):
        structure(sculpture.way, mask * torch.nan)
