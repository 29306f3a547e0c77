"""Train FlexIP Adapter: the whole way from a folder to a file, and what stops it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from host import flexips, stock, tiny_clip
from host.graphs import NodeGraph
from host.inprocess import Host
from host.prompts import PromptFailed, PromptInterrupted

TinyModel = Callable[[str], Any]
Trained = Callable[..., tuple[Any, ...]]
SETTINGS: dict[str, Any] = dict(
    folder="people",
    file_name="people",
    steps=4,
    batch=2,
    rate=1e-3,
    average=0.9,
    invariant_share=0.5,
    gamma_invariant_low=0.6,
    gamma_invariant_high=1.0,
    gamma_variant_low=0.2,
    gamma_variant_high=0.6,
    drop_subject=0.05,
    drop_text=0.05,
    drop_both=0.05,
    augmentation="flip",
    resolution=64,
    mode="literal",
    weighting="uniform",
    precision="auto",
    save_memory=True,
    seed=3,
    validate_every=2,
    resume=True,
    **flexips.SIZES,
)


@pytest.fixture(scope="module")
def parts(host: Host, tiny_model: TinyModel, demo: stock.Demo) -> dict[str, Any]:  # noqa: ARG001
    return {
        "model": tiny_model("sd3_bare"),
        "clip": tiny_clip.clip(),
        "vae": demo.vae,
        "low_encoder": flexips.encoder("dinov2"),
        "high_encoder": flexips.encoder("clip_vision_model"),
    }


@pytest.fixture
def models(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001
    """An empty models/flexip, and an input folder with pictures; two steps to a picture."""
    import folder_paths

    entry: tuple[list[str], set[str]] = ([str(tmp_path / "models")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "flexip", entry)
    monkeypatch.delitem(folder_paths.filename_list_cache, "flexip", raising=False)
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    flexips.folder(tmp_path / "input" / "people")
    return tmp_path / "models"


@pytest.fixture
def trained(
    models: Path,  # noqa: ARG001
    parts: dict[str, Any],
    pack: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> Trained:
    """Trains with changed settings; returns the node's outputs."""
    monkeypatch.setattr(pack.nodes.host.flexip_samples, "steps", 2)
    return lambda **changed: stock.call("PinpointTrainFlexIP", **{**parts, **SETTINGS, **changed})


def test_trains_and_saves(trained: Trained, models: Path) -> None:
    adapter, curve, validation, report = trained()
    assert (adapter.name, adapter.family, adapter.mode) == ("people", "SD3", "literal")
    assert curve.shape == (1, 300, 600, 3)
    assert validation.shape == (3, 64, 64, 3)
    # Three gammas, three pictures of the same noise.
    assert not torch.equal(validation[0], validation[2])
    assert "steps 0 to 4, from 2 invariant pictures, 4 variant ones of 2 subjects" in report
    assert sorted(file.name for file in models.iterdir()) == [
        "people.safetensors",
        "people.state.safetensors",
    ]
    assert str(models / "people.safetensors") in report


def test_file_is_loaded_and_applied(
    trained: Trained, parts: dict[str, Any], pack: ModuleType
) -> None:
    trained(rate=0.1)
    assert pack.nodes.host.adapter_files.names() == ["people.safetensors"]
    adapter, about = stock.call("PinpointLoadFlexIP", file_name="people.safetensors")
    assert "SD3" in about
    encoders = {name: parts[name] for name in ("low_encoder", "high_encoder")}
    image = torch.rand(1, 64, 64, 3)
    framing = dict(background="remove", margin=0.1, fit="pad", combine="concatenate")
    subject = stock.call("PinpointEncodeSubject", image=image, **encoders, **framing)[0]
    widgets = dict(gamma=0.5, weight=1.0, mode="as trained", start=0.0, end=1.0, blocks="all")
    model = parts["model"]
    (applied,) = stock.call(
        "PinpointApplyFlexIP", model=model, adapter=adapter, subject=subject, **widgets
    )
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    prompt = stock.conditioning(1)
    with_it, without = (stock.velocity(m, prompt, None, 1.0, x, 0.5) for m in (applied, model))
    assert (with_it - without).abs().max() > 1e-3
    assert adapter.encoders == subject.encoders
    swapped = dict(zip(encoders, reversed(encoders.values()), strict=True))
    subject = stock.call("PinpointEncodeSubject", image=image, **swapped, **framing)[0]
    with pytest.raises(ValueError, match="a low_encoder that is clip_vision_model 64 wide, of "):
        stock.call("PinpointApplyFlexIP", model=model, adapter=adapter, subject=subject, **widgets)


def test_a_training_goes_on_with_the_same_encoders_only(trained: Trained, models: Path) -> None:
    trained()
    shutil.rmtree(models.parent / "input" / "people" / "encoded")
    assert "steps 4 to 6" in trained(steps=6)[3]
    with pytest.raises(ValueError, match="with pictures people as dinov2 64 wide, of 28 pixels in"):
        trained(steps=8, low_encoder=flexips.encoder("dinov2", 128))


def test_trains_the_same_again_and_touches_no_other_randomness(trained: Trained) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = trained(), trained(file_name="other", resume=False)
    assert torch.equal(before, torch.get_rng_state())
    for index in (1, 2):
        assert torch.equal(first[index], second[index])


def test_model_is_as_it_was(trained: Trained, parts: dict[str, Any]) -> None:
    import comfy.model_management

    def seen() -> torch.Tensor:
        x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
        return stock.velocity(parts["model"], stock.conditioning(1), None, 1.0, x, 0.5)

    before = seen()
    trained()
    assert torch.equal(seen(), before)
    assert not comfy.model_management.in_training


def test_goes_on_or_begins_anew(trained: Trained) -> None:
    trained()
    assert "had made all of its 4 steps before" in trained()[3]
    assert "steps 4 to 6" in trained(steps=6)[3]
    assert "steps 0 to 4" in trained(resume=False)[3]
    with pytest.raises(
        ValueError, match=r"file people\.state\.safetensors holds the training of a"
    ):
        trained(width=128)


def test_without_validation_the_goal_is_shown(trained: Trained, pack: ModuleType) -> None:
    made: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.nodes.host.flexip_samples, "pictures", lambda *_: made.append(1))
        shown = trained(validate_every=0)[2]
    assert not made
    assert shown.shape == (1, 64, 64, 3)


def test_validation_that_fails_costs_nothing_trained(
    trained: Trained, pack: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pack.nodes.host.flexip_samples, "pictures", failing)
    report = trained()[3]
    assert "no validation pictures at step 4: out of memory" in report
    assert (models / "people.safetensors").exists()


def graph_of(parts: dict[str, Any], **changed: Any) -> NodeGraph:
    graph = NodeGraph()
    given = {name: graph.give(value) for name, value in parts.items()}
    graph.keep(graph.add("PinpointTrainFlexIP", **given, **{**SETTINGS, **changed}))
    return graph


def test_what_failed_goes_on_from_its_own_state_only(
    trained: Trained,
    pack: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> float:
        raise MemoryError

    trained()
    monkeypatch.setattr(pack.nodes.host.flexip_training.Trainer, "_backward", fail)
    for resume in (False, True):
        caplog.clear()
        with pytest.raises(MemoryError), caplog.at_level(logging.WARNING):
            trained(steps=6, resume=resume)
        assert ("stopped after step 4 of 6; with resume it goes on" in caplog.text) == resume
        assert ("it goes on from" in caplog.text) == resume


def test_interruption_keeps_the_state_and_the_next_prompt_goes_on(
    trained: Trained,  # noqa: ARG001
    host: Host,
    models: Path,
    parts: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import comfy.model_management
    import comfy.utils

    def stop(bar: Any, value: int, *_args: Any) -> None:
        if (value, bar.total) == (2, 4):
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        # Its hook is not called for every step of a fast training.
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", stop)
        with pytest.raises(PromptInterrupted):
            host.execute(graph_of(parts, validate_every=0).nodes)
    state = models / "people.state.safetensors"
    assert f"stopped after step 2 of 4; with resume it goes on from {state}" in caplog.text
    assert not (models / "people.safetensors").exists()
    graph = graph_of(parts, validate_every=0)
    report = host.execute(graph.nodes).value(graph.find("PinpointTrainFlexIP"), 3)
    assert "steps 2 to 4" in report


def test_progress_and_validation_are_shown(
    trained: Trained, pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.utils

    texts: list[str] = []
    previews: list[Any] = []
    monkeypatch.setattr(pack.nodes.host.progress, "show", texts.append)

    def bar(_value: int, _total: int, preview: Any, **_kwargs: Any) -> None:
        previews.append(preview)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", bar)
    trained()
    assert texts[0] == "encoding invariant/0.png, 1 of 12"
    assert any(text.startswith("step 4 of 4, loss") for text in texts)
    shown = [preview for preview in previews if preview is not None]
    assert len(shown) == 2
    kind, picture, _ = shown[0]
    assert (kind, picture.size) == ("JPEG", (3 * 64, 64))


def test_other_pictures_are_another_training(models: Path, host: Host) -> None:
    node = host.nodes["PinpointTrainFlexIP"]
    before = node.fingerprint_inputs(**SETTINGS)  # type: ignore[attr-defined]
    assert before == node.fingerprint_inputs(**SETTINGS)  # type: ignore[attr-defined]
    (models.parent / "input" / "people" / "invariant" / "0.txt").write_text("other", "utf-8")
    assert before != node.fingerprint_inputs(**SETTINGS)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"folder": "../people"}, r"folder is '\.\./people': write the name of a folder in"),
        ({"folder": "nobody"}, "folder .*nobody has no pictures in invariant"),
        ({"file_name": "../people"}, r"file_name is '\.\./people': write a name such as"),
        ({"file_name": ""}, "file_name is '': write a name such as"),
        (
            {"file_name": "ann.state"},
            r"file_name is 'ann\.state': names that end with \.state are of",
        ),
        ({"gamma_variant_low": 0.9}, "gamma_variant_low is 0.9 and gamma_variant_high 0.6: swap"),
        ({"drop_text": 0.99}, "drop_subject, drop_text and drop_both add up to 1.09: lower them"),
        ({"width": 100}, "width is 100: choose a multiple of 64"),
        ({"vae": None}, "vae is empty, as the checkpoint has none: use Load VAE"),
        ({"clip": None}, "clip is empty, as the checkpoint has no text encoder"),
        ({"low_encoder": None}, "low_encoder is empty"),
        (
            {"resolution": 68},
            "resolution is 68, the VAE encodes cells of 8 pixels: choose 64 or 72",
        ),
    ],
)
def test_what_cannot_be_trained_is_said(
    trained: Trained, models: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(**changed)
    assert not models.exists()


def test_models_that_cannot_be_trained_are_refused_before_anything_is_encoded(
    trained: Trained, parts: dict[str, Any], models: Path
) -> None:
    other = parts["model"].clone()
    other.cached_patcher_init = None
    with pytest.raises(ValueError, match="model comes from a loader that cannot load it a second"):
        trained(model=other)
    assert not (models.parent / "input" / "people" / "encoded").exists()


def test_an_error_in_a_graph_is_a_sentence(
    trained: Trained,  # noqa: ARG001
    host: Host,
    parts: dict[str, Any],
) -> None:
    with pytest.raises(PromptFailed, match="folder is '': write the name of a folder"):
        host.execute(graph_of(parts, folder="").nodes)
