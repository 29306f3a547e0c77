"""The proving ground's image encoders know what published ones know: details, or the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from host import stock
from host.inprocess import Host
from portraits import dataset, probes, weights
from portraits.image_encoders import ENCODERS, build, normalised, resized
from portraits.probes import Findings

BYTES = 3e6
KNOWN, ASKED = 300, 100
"""Portraits to fit probes on, and held-out ones: few, so that the probes are worse than they are
with thousands."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other on a busy machine would be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name: str) -> Any:
    file = ENCODERS[name].file.name
    return stock.call("PinpointLoadImageEncoder", file_name=file, activation="auto")[0]


@pytest.fixture(scope="module")
@torch.inference_mode()
def found(host: Host) -> dict[str, Findings]:  # noqa: ARG001
    """What probes read from the patches of the low encoder, and the high one's embedding."""
    known = dataset.people("train", 5, KNOWN)
    asked = dataset.people("tests", 5, ASKED)
    images = dataset.pictures(known + asked).movedim(1, -1).float() / 255
    low, high = ([load(name).encode_image(part) for part in images.split(50)] for name in ENCODERS)
    seen = {
        "patches": torch.cat([output.last_hidden_state[:, 1:].flatten(1) for output in low]),
        "embedding": torch.cat([output.image_embeds for output in high]),
    }
    truths = probes.labels(known), probes.labels(asked)
    return {
        name: probes.probed(part[:KNOWN], truths[0], part[KNOWN:], truths[1])
        for name, part in seen.items()
    }


def test_the_low_encoder_keeps_geometry(found: dict[str, Findings]) -> None:
    known = found["patches"].r2
    for name in ("center x", "center y", "eye distance", "eye size", "eye height"):
        assert known[name] > 0.6, known


def test_the_high_encoder_knows_the_whole(found: dict[str, Findings]) -> None:
    known = found["embedding"].accuracy
    for name in ("skin", "eyewear", "lips", "beard", "hat", "shirt", "background"):
        assert known[name] > 0.8, known


def test_the_files_are_small_and_of_stock_keys(host: Host) -> None:  # noqa: ARG001
    assert sum(encoder.file.stat().st_size for encoder in ENCODERS.values()) <= BYTES
    for name, encoder in ENCODERS.items():
        tensors = load_file(encoder.file)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert tensors.keys() == load(name).get_sd().keys()


def test_training_sees_what_comfyui_sees(host: Host) -> None:  # noqa: ARG001
    images = dataset.pictures(dataset.people("tests", 0, 2)).float() / 255
    for name, encoder in ENCODERS.items():
        model = build(encoder)
        model.load_state_dict({key: t.float() for key, t in load_file(encoder.file).items()})
        with torch.inference_mode():
            expected = load(name).encode_image(images.movedim(1, -1))
            last, before, embedding, _ = model(normalised(encoder, images), intermediate_output=-2)
        assert torch.allclose(last, expected.last_hidden_state, atol=1e-4)
        assert torch.allclose(before, expected.penultimate_hidden_states, atol=1e-4)
        assert torch.allclose(embedding, expected.image_embeds, atol=1e-4)


def test_the_loader_infers_what_they_were_built_from(host: Host) -> None:  # noqa: ARG001
    for name, encoder in ENCODERS.items():
        loaded = load(name)
        found = {**loaded.config, "image_mean": loaded.image_mean, "image_std": loaded.image_std}
        assert {key: found[key] for key in encoder.config} == encoder.config


def test_pictures_are_prepared_as_comfyui_does(host: Host) -> None:  # noqa: ARG001
    from comfy.clip_model import clip_preprocess

    drawn: Tensor = dataset.pictures(dataset.people("tests", 0, 2))
    for encoder in ENCODERS.values():
        mean, std = encoder.config["image_mean"], encoder.config["image_std"]
        expected = clip_preprocess(drawn.movedim(1, -1).float() / 255, 112, mean, std)
        found = normalised(encoder, resized(drawn).float() / 255)
        assert torch.allclose(found, expected, atol=1e-6)


def test_weights_are_where_the_host_looks(host: Host) -> None:
    for file in (weights.low_encoder_file, weights.high_encoder_file):
        offered = host.base / "models" / "clip_vision" / file.name
        assert offered.read_bytes() == file.read_bytes()
        assert not offered.samefile(file)
