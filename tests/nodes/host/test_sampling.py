"""Edit samplers against loops written out from the papers, and what they refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import Edit, left_half, picture_latent, soft_ramp

# Latents of a few units after five steps, each amplified by a guidance of 4.
TOLERANCE = 2e-4

TinyModel = Callable[[str], Any]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error = (found - expected).abs().max().item()
    assert error <= tolerance, f"{error:.1e}"


LOOPS: dict[str, dict[str, Any]] = {
    "FlowEdit": dict(method="FlowEdit"),
    "FlowEdit, n_avg": dict(method="FlowEdit", n_avg=3),
    "FlowEdit, n_min": dict(method="FlowEdit", n_min=2),
    "FlowEdit, whole schedule": dict(method="FlowEdit", n_max=6, n_avg=2, n_min=1),
    "FlowEdit, sampling only": dict(method="FlowEdit", n_max=4, n_min=4),
    "FocusFlow, no mask": dict(),
    "FocusFlow, hard mask": dict(mask=left_half),
    "FocusFlow, soft mask": dict(mask=soft_ramp, n_avg=2),
    "FocusFlow, hard mask, n_min": dict(mask=left_half, n_min=2),
    "FocusFlow, soft mask, n_min": dict(mask=soft_ramp, n_min=3, n_avg=2),
    "published": dict(method="FocusFlow as published", mask=soft_ramp, n_avg=3),
    "published, no mask": dict(method="FocusFlow as published"),
    "published, n_min": dict(method="FocusFlow as published", mask=left_half, n_min=2, n_max=6),
}


@pytest.mark.parametrize("settings", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("name", ["sd3", "schnell"])
def test_every_method_equals_its_loop(
    tiny_model: TinyModel, name: str, settings: dict[str, Any]
) -> None:
    latent, mask = picture_latent(2, 6, 9), settings.get("mask")
    settings = {**settings, "mask": None if mask is None else mask(latent)}
    edit = Edit(tiny_model(name), latent, **settings)
    expected = edit.written_out()
    assert (expected - latent).abs().max() > 0.1, "the example does nothing"
    assert_close(edit.run(), expected)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
@pytest.mark.parametrize(
    "size", [(1, 8, 8), (2, 5, 9), (5, 7, 4), (1, 1, 1)], ids=lambda size: "x".join(map(str, size))
)
def test_every_size_equals_the_loop(
    tiny_model: TinyModel, name: str, size: tuple[int, int, int]
) -> None:
    batch, *area = size
    frames = [2] if name == "wan" else []
    edit = Edit(tiny_model(name), picture_latent(batch, *frames, *area), n_max=3, n_min=1)
    assert_close(edit.run(), edit.written_out())


def test_masks_of_video_edit_every_frame(tiny_model: TinyModel) -> None:
    latent = picture_latent(2, 3, 6, 6)
    edited = Edit(tiny_model("wan"), latent, mask=left_half(latent)).run()
    assert torch.equal(edited[..., 3:], latent[..., 3:])
    moved = (edited - latent)[..., :3].abs().amax((1, 3, 4))
    assert (moved > 0.01).all()


def test_draws_use_different_noises(tiny_model: TinyModel) -> None:
    """Otherwise an average over draws would be one draw at a higher price."""
    edit = Edit(tiny_model("sd3"), n_max=1, steps=2)
    single, double = edit.run(), edit.having(n_avg=2).run()
    assert (single - double).abs().max() > 1e-3


@pytest.mark.parametrize("draws_per_call", [1, 2, 3])
@pytest.mark.parametrize("method", ["FocusFlow", "FocusFlow as published"])
def test_draws_may_be_split_over_calls(
    pack: ModuleType,
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    draws_per_call: int,
) -> None:
    edit = Edit(tiny_model("sd3"), picture_latent(2), method, n_avg=5, n_min=1)
    whole = edit.run()
    monkeypatch.setattr(
        pack.nodes.host.guiding.SourceTargetGuider,
        "draws_per_call",
        lambda self, latent, draws: min(draws, draws_per_call),  # noqa: ARG005
    )
    assert_close(edit.run(), whole)


def test_fewer_draws_go_into_a_call_when_memory_is_short(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("sd3").clone()
    guider = Edit(model).parts()["guider"]
    guider.inner_model = model.model
    latent = picture_latent(2)
    one = model.model.memory_required([2, *latent.shape[1:]]) * 1.5
    for rooms, expected in {0: 1, 0.5: 1, 2.5: 2, 3.5: 3, 100: 10}.items():
        monkeypatch.setattr(model, "get_free_memory", lambda device, r=rooms: one * r)  # noqa: ARG005
        draws = guider.draws_per_call(latent, 10)
        assert draws <= max(1, rooms)
        assert draws == expected, f"room for {rooms} draws"


@pytest.mark.parametrize("n_min", [0, 2])
def test_reanchoring_pulls_soft_masks_back_every_step(tiny_model: TinyModel, n_min: int) -> None:
    latent = picture_latent()
    edit = Edit(tiny_model("sd3"), latent, mask=soft_ramp(latent), n_min=n_min)
    pulled = edit.having(reanchor=True)
    assert_close(pulled.run(), pulled.written_out())
    assert (pulled.run() - edit.run()).abs().max() > 1e-3


def test_reanchoring_does_not_touch_hard_masks(tiny_model: TinyModel) -> None:
    latent = picture_latent()
    edit = Edit(tiny_model("sd3"), latent, mask=left_half(latent))
    assert torch.equal(edit.run(), edit.having(reanchor=True).run())


def test_differential_diffusion_opens_the_mask_step_by_step(tiny_model: TinyModel) -> None:
    """The stock node thresholds the mask by the progress of the schedule: 1 opens first."""
    latent, plain = picture_latent(1, 8, 9), tiny_model("sd3")
    mask = soft_ramp(latent)
    model = stock.call("DifferentialDiffusion", model=plain, strength=1.0)[0]
    edit = Edit(model, latent, n_max=6, mask=mask)
    sampling, sigmas = model.model.model_sampling, edit.sigmas()
    last, first = sampling.timestep(sampling.sigma_min), sampling.timestep(sigmas[0])
    opened = []

    def opened_at(sigma: float) -> Tensor:
        progress = (sampling.timestep(torch.tensor(sigma)) - last) / (first - last)
        opened.append(int((mask >= progress)[0, 0].sum()))
        return (mask >= progress).float()

    assert_close(edit.run(), edit.having(model=plain).written_out(opened_at))
    assert opened[0] == 1
    assert opened == sorted(opened)
    assert opened[-1] > opened[0]


@pytest.mark.parametrize("n_min", [0, 2])
def test_noise_mask_of_the_latent_works_like_the_mask_input(
    tiny_model: TinyModel, n_min: int
) -> None:
    latent = picture_latent()
    edit, half = Edit(tiny_model("sd3"), latent, n_min=n_min), left_half(latent)
    by_input = edit.having(mask=half).run()
    by_latent = edit.having(noise_mask=half).run()
    assert torch.equal(by_input, by_latent)
    top = left_half(latent).transpose(1, 2)
    both = edit.having(mask=half, noise_mask=top).run()
    assert torch.equal(both, edit.having(mask=half * top).run())
    assert not torch.equal(both, by_input)


MASK_SIZES = {"same": (8, 8), "pixels": (64, 64), "small": (3, 5), "odd": (61, 67), "one": (1, 1)}


@pytest.mark.parametrize("size", MASK_SIZES.values(), ids=MASK_SIZES)
@pytest.mark.parametrize("n_min", [0, 2])
def test_full_and_empty_masks_of_any_size(
    tiny_model: TinyModel, size: tuple[int, int], n_min: int
) -> None:
    latent = picture_latent(2)
    edit = Edit(tiny_model("sd3"), latent, n_min=n_min)
    assert torch.equal(edit.having(mask=torch.ones(1, *size)).run(), edit.run())
    assert torch.equal(edit.having(mask=torch.zeros(1, *size)).run(), latent)


def test_each_picture_of_a_batch_may_have_its_mask(tiny_model: TinyModel) -> None:
    latent = picture_latent(2)
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    edit = Edit(tiny_model("sd3"), latent)
    edited = edit.having(mask=masks).run()
    assert torch.equal(edited[0], latent[0])
    assert torch.equal(edited[1], edit.run()[1])


def test_masks_out_of_range_are_clipped(tiny_model: TinyModel) -> None:
    latent = picture_latent()
    wild = left_half(latent) * 9 - 4
    edit = Edit(tiny_model("sd3"), latent)
    assert torch.equal(edit.having(mask=wild).run(), edit.having(mask=wild.clamp(0, 1)).run())


@pytest.mark.parametrize("method", ["FocusFlow", "FlowEdit", "FocusFlow as published"])
@pytest.mark.parametrize("n_min", [0, 2])
def test_preview_shows_clean_pictures_and_ends_with_the_result(
    tiny_model: TinyModel, method: str, n_min: int
) -> None:
    edit = Edit(tiny_model("sd3"), method=method, n_min=n_min)
    parts, seen = edit.parts(), []

    def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        seen.append((step, total, denoised.clone(), x.clone()))

    noise = torch.ones_like(edit.latent)
    with torch.inference_mode():
        result = parts["guider"].sample(
            noise,
            edit.latent,
            parts["sampler"],
            parts["sigmas"],
            callback=callback,
            disable_pbar=True,
            seed=edit.seed,
        )
    assert [(step, total) for step, total, *_ in seen] == [(i, 5) for i in range(5)]
    last = edit.model.model.process_latent_out(seen[-1][2])
    assert_close(last, result)


def test_preview_predicts_the_end_of_a_constant_motion(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, pack: ModuleType
) -> None:
    """If the velocities stay as they are, every preview shows the same final picture."""
    edit = Edit(tiny_model("sd3"))
    motion = picture_latent(seed=5)
    monkeypatch.setattr(
        pack.nodes.host.guiding.SourceTargetGuider,
        "velocities",
        lambda self, *latents, **_: (motion, torch.zeros_like(motion)),  # noqa: ARG005
    )
    seen: list[Tensor] = []
    parts = edit.parts()
    with torch.inference_mode():
        parts["guider"].sample(
            torch.ones_like(edit.latent),
            edit.latent,
            parts["sampler"],
            parts["sigmas"],
            callback=lambda step, denoised, x, total: seen.append(denoised),  # noqa: ARG005
            disable_pbar=True,
            seed=1,
        )
    for preview in seen:
        assert_close(preview, seen[-1], 1e-5)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "n_max beyond the schedule": (
        dict(n_max=7),
        r"^n_max is 7, but the sigmas have only 6 steps: lower n_max to 6 or raise",
    ),
    "n_min beyond n_max": (dict(n_max=3, n_min=4), r"^n_min is 4, more than n_max \(3\).*lower it"),
    "masks of another batch": (
        dict(latent=picture_latent(3), mask=torch.ones(2, 8, 8)),
        r"^mask has 2 images, the latent 3: use one mask, or one for each",
    ),
    "latent of another model": (
        dict(latent=picture_latent(1, 8, 8, channels=4)),
        r"^latent has 4 channels, the model needs 16: encode",
    ),
    "NaN in the latent": (
        dict(latent=torch.full((1, 16, 8, 8), torch.nan)),
        r"^latent holds values that are not finite",
    ),
    "NaN in the mask": (
        dict(mask=torch.full((1, 8, 8), torch.nan)),
        r"^mask .*not finite",
    ),
    "an infinite guidance": (
        dict(target_guidance=torch.inf),
        r"^target_guidance is inf: enter a ",
    ),
    "a guidance that is no number": (
        dict(source_guidance=torch.nan),
        r"^source_guidance is nan: enter a ",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("method", ["FocusFlow", "FlowEdit", "FocusFlow as published"])
def test_impossible_edits_are_refused_in_a_sentence(
    tiny_model: TinyModel, settings: dict[str, Any], message: str, method: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Edit(tiny_model("sd3"), **{"method": method, **settings}).run()


def test_disabled_noise_is_refused(tiny_model: TinyModel) -> None:
    parts = Edit(tiny_model("sd3")).parts() | {"noise": stock.call("DisableNoise")[0]}
    with pytest.raises(ValueError, match=r"^noise is empty \(Disable Noise\): connect RandomNoise"):
        stock.call("SamplerCustomAdvanced", **parts)


SCHEDULES = {
    "flipped": [0.0, 0.2, 0.5, 0.8, 0.9, 1.0],
    "of an eps model": [14.6, 3.0, 0.5, 0.2, 0.1, 0.0],
    "not a number": [0.9, torch.nan, 0.5, 0.3, 0.1, 0.0],
    "a single one": [0.5],
}


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_sigmas_that_are_no_schedule_are_refused(
    tiny_model: TinyModel, sigmas: list[float]
) -> None:
    with pytest.raises(ValueError, match=r"^sigmas .*: connect the sigmas of a scheduler"):
        Edit(tiny_model("sd3"), schedule=torch.tensor(sigmas)).run()


def test_a_step_of_no_length_changes_nothing(tiny_model: TinyModel) -> None:
    """Schedulers repeat a sigma when asked for more steps than the model has noise levels."""
    repeated = torch.tensor([0.6, 0.6, 0.3, 0.3, 0.0])
    edit = Edit(tiny_model("sd3"), steps=4, n_max=4, n_min=1, schedule=repeated)
    assert_close(edit.run(), edit.written_out())


def test_a_guider_of_one_prompt_is_refused(tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("sd3"))
    guider = stock.call(
        "CFGGuider", model=edit.model, positive=edit.target, negative=edit.negative, cfg=4.0
    )[0]
    message = r"^guider is a .*CFG.*, which knows one prompt only: connect a Source/Target Guider"
    with pytest.raises(ValueError, match=message):
        stock.call("SamplerCustomAdvanced", **(edit.parts() | {"guider": guider}))


WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "equal prompts": (
        dict(target=stock.conditioning(1), target_guidance=1.5),
        "source and target prompts and guidances are the same",
    ),
    "an empty mask": (dict(mask=torch.zeros(1, 8, 8)), "the mask is empty"),
    "an empty noise mask": (dict(noise_mask=torch.zeros(1, 8, 8)), "the mask is empty"),
    "a mask for FlowEdit": (
        dict(method="FlowEdit", mask=torch.ones(1, 8, 8)),
        "FlowEdit has no mask",
    ),
}


@pytest.mark.parametrize(("settings", "message"), WARNINGS.values(), ids=WARNINGS)
def test_settings_without_effect_are_told(
    tiny_model: TinyModel,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    message: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        Edit(tiny_model("sd3")).run()
        assert not caplog.records
        Edit(tiny_model("sd3"), **settings).run()
    (record,) = caplog.records
    assert record.getMessage().startswith("Pinpoint: ")
    assert message in record.getMessage()


@pytest.mark.parametrize("method", ["FocusFlow", "FlowEdit", "FocusFlow as published"])
@pytest.mark.parametrize("n_min", [0, 2])
def test_equal_prompts_are_told_exactly_where_they_have_no_effect(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, method: str, n_min: int
) -> None:
    """Free steps and the published rule change the picture even then."""
    same = Edit(
        tiny_model("sd3"),
        method=method,
        n_min=n_min,
        target=stock.conditioning(1),
        target_guidance=1.5,
    )
    with caplog.at_level(logging.WARNING):
        unchanged = torch.equal(same.run(), same.latent)
    assert ("nothing will change" in caplog.text) == unchanged
    assert unchanged == (n_min == 0 and method != "FocusFlow as published")


def test_flowedit_ignores_the_mask(tiny_model: TinyModel) -> None:
    latent = picture_latent()
    edit = Edit(tiny_model("sd3"), latent, method="FlowEdit")
    assert torch.equal(edit.having(mask=left_half(latent)).run(), edit.run())
