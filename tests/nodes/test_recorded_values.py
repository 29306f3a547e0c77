"""What Record Values keeps, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from host import stock
from host.edits import latent_for, picture_latent
from host.inversions import (
    FLOWS,
    METHODS,
    Calls,
    Inversion,
    inversion_for,
    recording,
    velocity,
)
from host.recordings import bytes_of, in_windows, recorded, source

TinyModel = Callable[[str], Any]
models = pytest.mark.parametrize("name", FLOWS)


@pytest.fixture
def recorder(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.recording


@pytest.mark.parametrize("tokens", ["image", "image and text"])
@pytest.mark.parametrize(
    ("name", "method"),
    [*(("sd3", method) for method in METHODS), *((name, "FireFlow") for name in FLOWS[1:])],
)
def test_cost_is_what_is_kept_and_refused_before_the_first_call(
    tiny_model: TinyModel, recorder: ModuleType, name: str, tokens: str, method: str
) -> None:
    model, latent = tiny_model(name), latent_for(name, 2, 5, 6)
    node = recording(model, tokens=tokens, precision="bf16", start=0.1, end=0.8)
    settings = node.model_options["transformer_options"][recorder.recorder_key]
    job = inversion_for(node, name, latent=latent, method=method)
    _, _, trajectory, report = job.run()
    kept = trajectory.values.bytes
    assert kept == bytes_of(trajectory.values) > 0
    assert f"recorded values take {kept / 1e6:.1f} MB" in report
    calls = Calls(model)
    exactly = recorder.recording_model(calls.model, replace(settings, limit=kept))
    assert job.having(model=exactly).run()[2].values.bytes == kept
    calls.sigmas.clear()
    below = recorder.recording_model(calls.model, replace(settings, limit=kept - 1))
    with pytest.raises(ValueError, match=r"recording would take .* raise limit_gb"):
        job.having(model=below).run()
    assert not calls.sigmas


@pytest.mark.parametrize(
    ("length", "overlap", "schedule", "widgets"),
    [
        (3, 2, "standard_static", {}),
        (3, 1, "standard_static", dict(causal_window_fix=True)),
        (4, 0, "batched", {}),
        (3, 1, "standard_uniform", dict(context_stride=2)),
        (3, 1, "looped_uniform", dict(context_stride=2, closed_loop=True)),
        (9, 0, "standard_static", {}),
    ],
)
def test_every_context_window_is_counted(
    tiny_model: TinyModel,
    recorder: ModuleType,
    length: int,
    overlap: int,
    schedule: str,
    widgets: dict[str, Any],
) -> None:
    calls = Calls(tiny_model("wan"))
    model = recording(in_windows(calls.model, length, overlap, schedule, **widgets), end=0.9)
    job = Inversion(model, picture_latent(1, 9, 4, 4), method="RF-Solver")
    _, _, trajectory, report = job.run()
    kept = trajectory.values.bytes
    assert kept == bytes_of(trajectory.values)
    assert f"recorded values take {kept / 1e6:.1f} MB" in report
    settings = model.model_options["transformer_options"][recorder.recorder_key]
    below = recorder.recording_model(model, replace(settings, limit=kept - 1))
    calls.sigmas.clear()
    with pytest.raises(ValueError, match=r"recording would take .* raise limit_gb"):
        job.having(model=below).run()
    assert not calls.sigmas


def test_what_no_cost_foresaw_is_refused_at_the_limit(
    tiny_model: TinyModel, recorder: ModuleType
) -> None:
    """Context windows of other packs, for example, are not known beforehand."""
    model = recording(tiny_model("sd3"))
    options = model.model_options["transformer_options"]
    one = 16 * 128 * 4
    store = recorder.Recording(replace(options[recorder.recorder_key], limit=3.5 * one))
    options[recorder.recording_key] = store
    x = latent_for("sd3")
    velocity(model, source(), x, 0.6)
    with pytest.raises(ValueError, match=r"recording would take .* raise limit_gb"):
        velocity(model, source(), x, 0.5)
    assert store.bytes == bytes_of(store) == 3 * one


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("fp8", 1)])
def test_precision_is_bytes(tiny_model: TinyModel, precision: str, size: int) -> None:
    trajectory = recorded(tiny_model("flux"), "flux", precision=precision)[0]
    # Four levels, two blocks, 16 tokens of 128 numbers; the text's values are not kept alive.
    assert trajectory.values.bytes == 4 * 2 * 16 * 128 * size == bytes_of(trajectory.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-5, 1.0, 6e4])
def test_fp8_keeps_values_of_any_size(
    pack: ModuleType, recorder: ModuleType, dtype: torch.dtype, size: float
) -> None:
    host = pack.nodes.host
    block, tokens = host.layouts.Block("double", 0), slice(0, 20)
    call = host.tap.ModelCall((1, 16, 4, 5), [(None, 0)], None, 0.5, None, {})
    place = host.layouts.Place(block, "self", tokens, None, (1, 4, 5))
    values = torch.linspace(-size, size, 20 * 8).view(1, 1, 20, 8).to(dtype)
    attention = host.tap.Attention(call, place, values, values, values, None, 1.0)
    settings = recorder.RecordSettings(frozenset([block]), 1.0, 0.0, precision="fp8")
    store = recorder.Recording(settings)
    store.keep(attention)
    found, text = store.nearest(attention)
    assert text == 0
    assert found.dtype == dtype
    torch.testing.assert_close(found, values, rtol=0, atol=size / 16)


@pytest.mark.parametrize("method", METHODS)
def test_levels_next_to_no_noise_are_one(
    tiny_model: TinyModel, recorder: ModuleType, method: str
) -> None:
    """The model is told the same noise level for them."""
    node = recording(tiny_model("sd3"))
    settings = node.model_options["transformer_options"][recorder.recorder_key]
    job = Inversion(node, schedule=(0.4, 6e-4, 2e-4, 0.0), method=method)
    kept = job.run()[2].values.bytes
    exactly = recorder.recording_model(node, replace(settings, limit=kept))
    assert job.having(model=exactly).run()[2].values.bytes == kept
    with pytest.raises(ValueError, match="recording would take"):
        job.having(model=recorder.recording_model(node, replace(settings, limit=kept - 1))).run()


def test_values_are_the_positive_prompts(tiny_model: TinyModel) -> None:
    model = recording(tiny_model("sd3"))
    job = Inversion(model, method="Euler", negative=stock.conditioning(3))
    alone, guided = (job.having(guidance=scale).run()[2].values for scale in (1.0, 3.0))
    assert alone.bytes == guided.bytes
    for key, levels in alone.kept.items():
        # The first level's latent is the same for both.
        first = min(levels)
        torch.testing.assert_close(
            guided.kept[key][first].values, levels[first].values, rtol=0, atol=1e-4
        )


def test_recording_keeps_only_its_part_and_blocks(tiny_model: TinyModel) -> None:
    model = tiny_model("schnell")
    trajectory = recorded(model, "schnell", blocks="single", start=0.2, end=0.6)[0]
    kept = trajectory.values.kept
    assert [str(block) for block, _window in kept] == ["single 0"]
    assert [sorted(levels) for levels in kept.values()] == [pytest.approx([0.55, 0.8])]
