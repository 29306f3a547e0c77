"""References encoded for adapters, through the node."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.inprocess import Host
from portraits import weights
from portraits.dataset import people, pictures

DEFAULTS = {"background": "remove", "margin": 0.1, "fit": "pad", "combine": "concatenate"}
SIDE = 112


@pytest.fixture(scope="module")
def low(host: Host) -> Any:  # noqa: ARG001
    return load(weights.low_encoder_file.name)


@pytest.fixture(scope="module")
def high(host: Host) -> Any:  # noqa: ARG001
    return load(weights.high_encoder_file.name)


@pytest.fixture(scope="module")
def portraits() -> Tensor:
    # As LoadImage gives them.
    return (pictures(people("tests", 0, 3)).movedim(1, -1).float() / 255).contiguous()


def load(name: str) -> Any:
    return stock.call("PinpointLoadImageEncoder", file_name=name, activation="auto")[0]


def encode(image: Tensor, low: Any, high: Any = None, mask: Any = None, **changes: Any) -> Any:
    inputs = {**DEFAULTS, "high_encoder": high, "mask": mask, **changes}
    return stock.call("PinpointEncodeSubject", image=image, low_encoder=low, **inputs)


def tensors(subject: Any) -> list[Tensor]:
    return [subject.low, subject.high, subject.hidden, subject.blank]


def require_same(one: Any, other: Any) -> None:
    """Two subjects are the same to the last bit."""
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(a, b)


def oval(height: int = 128, width: int = 128) -> Tensor:
    """A mask (1, H, W) of the middle half."""
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    return mask


# What the encoders see


def test_a_subject_is_what_the_stock_node_encodes(low: Any, high: Any, portraits: Tensor) -> None:
    subject, picture = encode(portraits, low, high)
    for index, portrait in enumerate(portraits):
        seen = [
            stock.call(
                "CLIPVisionEncode", clip_vision=encoder, image=portrait[None], crop="center"
            )[0]
            for encoder in (low, high)
        ]
        assert torch.equal(subject.low[index], seen[0].last_hidden_state[0, 1:])
        assert torch.equal(subject.high[index], seen[1].image_embeds[0])
        assert torch.equal(subject.hidden[index], seen[1].penultimate_hidden_states[0])
    blank = high.encode_image(torch.tensor(high.image_mean).expand(1, SIDE, SIDE, 3))
    torch.testing.assert_close(subject.blank, blank.penultimate_hidden_states)
    assert subject.low.shape == (3, 64, 128)
    assert subject.hidden.shape == (3, 65, 128)
    assert picture.shape == (3, SIDE, SIDE, 3)


def test_the_picture_is_what_the_low_encoder_reads(low: Any, portraits: Tensor) -> None:
    subject, picture = encode(portraits[:1, :100, :70], low)
    require_same(encode(picture, low)[0], subject)


def test_one_encoder_does_both(low: Any, high: Any, portraits: Tensor) -> None:
    alone, both = encode(portraits, low)[0], encode(portraits, low, low)[0]
    require_same(alone, both)
    assert torch.equal(alone.low, encode(portraits, low, high)[0].low)
    assert torch.equal(alone.high, low.encode_image(portraits).image_embeds)
    assert alone.high_input == "low_encoder"
    assert both.high_input == "high_encoder"


def test_the_patches_of_a_clip_are_those_before_its_last_layer(
    high: Any, portraits: Tensor
) -> None:
    subject, _ = encode(portraits, high)
    assert torch.equal(subject.low, subject.hidden[:, 1:])


def test_a_reference_does_not_depend_on_its_batch(low: Any, high: Any, portraits: Tensor) -> None:
    together = encode(portraits, low, high, oval())[0]
    for index in range(len(portraits)):
        apart = encode(portraits[index : index + 1], low, high, oval())[0]
        assert torch.equal(together.low[index], apart.low[0])
        assert torch.equal(together.high[index], apart.high[0])
        assert torch.equal(together.hidden[index], apart.hidden[0])


def test_average_is_the_mean_of_the_references(low: Any, high: Any, portraits: Tensor) -> None:
    every, mean = (
        encode(portraits, low, high)[0],
        encode(portraits, low, high, combine="average")[0],
    )
    for one, all_of_them in zip(tensors(mean)[:3], tensors(every)[:3], strict=True):
        assert torch.allclose(one, all_of_them.mean(0, keepdim=True), atol=1e-6)
    assert torch.equal(mean.blank, every.blank)


def test_adapters_can_be_trained_on_it(low: Any, portraits: Tensor) -> None:
    """ComfyUI's executor runs nodes in inference mode, whose tensors gradients cannot follow."""
    assert not any(tensor.is_inference() for tensor in tensors(encode(portraits, low)[0]))


def test_nothing_sticks_to_inputs(low: Any, high: Any, portraits: Tensor) -> None:
    mask, before = oval(), portraits.clone()
    require_same(encode(portraits, low, high, mask)[0], encode(portraits, low, high, mask)[0])
    assert torch.equal(portraits, before)
    assert torch.equal(mask, oval())


def test_how_a_picture_lies_in_memory_changes_nothing(low: Any, portraits: Tensor) -> None:
    strided = portraits.movedim(-1, 1).contiguous().movedim(1, -1)
    assert not strided.is_contiguous()
    require_same(encode(strided, low)[0], encode(portraits, low)[0])


# Colours and shapes


def test_grey_and_transparent_pictures_are_taken(low: Any, portraits: Tensor) -> None:
    grey = portraits.mean(-1, keepdim=True)
    require_same(encode(grey, low)[0], encode(grey.expand(-1, -1, -1, 3), low)[0])
    opaque = torch.cat([portraits, torch.ones_like(grey)], -1)
    require_same(encode(opaque, low)[0], encode(portraits, low)[0])
    clear = torch.cat([portraits, torch.zeros_like(grey)], -1)
    color = torch.tensor(low.image_mean).expand_as(portraits)
    require_same(encode(clear, low)[0], encode(color, low)[0])


def test_squares_are_padded_or_cut_never_distorted(low: Any, portraits: Tensor) -> None:
    wide = portraits[:1, 32:96]
    padded = torch.tensor(low.image_mean).repeat(1, 128, 128, 1)
    padded[:, 32:96] = wide
    require_same(encode(wide, low)[0], encode(padded, low)[0])
    require_same(encode(wide, low, fit="crop")[0], encode(wide[:, :, 32:96], low)[0])
    cut = stock.call("CLIPVisionEncode", clip_vision=low, image=wide, crop="center")[0]
    found = encode(wide, low, fit="crop")[0].high
    assert torch.allclose(found, cut.image_embeds, atol=0.1)


def test_colours_outside_the_range_are_cut(low: Any, portraits: Tensor) -> None:
    beyond = portraits * 3 - 1
    require_same(encode(beyond, low)[0], encode(beyond.clamp(0, 1), low)[0])


# Masks


def test_a_mask_shows_its_box_with_a_margin(low: Any, portraits: Tensor) -> None:
    kept = {"background": "keep"}
    found = encode(portraits, low, mask=oval(), margin=0.0, **kept)[0]
    require_same(found, encode(portraits[:, 32:96, 32:96], low)[0])
    found = encode(portraits, low, mask=oval(), margin=0.25, **kept)[0]
    require_same(found, encode(portraits[:, 16:112, 16:112], low)[0])
    found = encode(portraits, low, mask=oval(), margin=1.0, **kept)[0]
    require_same(found, encode(portraits, low)[0])


def test_the_background_becomes_each_encoders_mean_colour(
    low: Any, high: Any, portraits: Tensor
) -> None:
    found, picture = encode(portraits, low, high, oval(), margin=1.0)
    expected = {}
    for name, encoder in (("low", low), ("high", high)):
        shown = torch.tensor(encoder.image_mean).expand_as(portraits).clone()
        shown[:, 32:96, 32:96] = portraits[:, 32:96, 32:96]
        expected[name] = encode(shown, low, high)
    assert torch.equal(found.low, expected["low"][0].low)
    assert torch.equal(found.high, expected["high"][0].high)
    assert torch.equal(found.hidden, expected["high"][0].hidden)
    assert torch.equal(picture, expected["low"][1])


def test_what_is_outside_a_mask_is_not_seen(low: Any, high: Any, portraits: Tensor) -> None:
    other = torch.where(oval()[..., None] > 0, portraits, 1 - portraits)
    found = encode(other, low, high, oval())[0]
    require_same(found, encode(portraits, low, high, oval())[0])


def test_each_reference_has_its_own_mask(low: Any, portraits: Tensor) -> None:
    masks = torch.cat([oval(), oval().roll(20, 1), oval().roll(-20, 2)])
    together = encode(portraits, low, mask=masks)[0]
    for index in range(3):
        part = slice(index, index + 1)
        apart = encode(portraits[part], low, mask=masks[part])[0]
        assert torch.equal(together.low[part], apart.low)


def test_a_full_mask_changes_nothing(low: Any, portraits: Tensor) -> None:
    found = encode(portraits, low, mask=torch.ones(128, 128))[0]
    require_same(found, encode(portraits, low)[0])


# Refusals


class Stranger:
    """Another pack's encoder, without an image embedding."""

    model_type, image_size, image_mean = "clip_vision_model", SIDE, (0.5, 0.5, 0.5)

    def __init__(self, **output: Any):
        self.config: dict[str, Any] = {}
        self.output = type("Output", (), output)()

    def encode_image(self, _image: Tensor) -> Any:
        return self.output


def spot(side: int) -> Tensor:
    """A mask (1, 128, 128) of a small square."""
    mask = torch.zeros(1, 128, 128)
    mask[:, 60 : 60 + side, 70 : 70 + side] = 1
    return mask


def nan(*size: int) -> Tensor:
    return torch.full(size, torch.nan)


Change = Callable[[Tensor], dict[str, Any]]
REFUSALS: dict[str, tuple[Change, str]] = {
    "no pictures": (lambda x: {"image": x[:0]}, "image has no pictures: connect at least one"),
    "channels": (lambda x: {"image": x[..., :2]}, "image has 2 channels: use a grey, RGB or RGBA"),
    "nan": (lambda x: {"image": x * torch.nan}, "image holds values that are not finite: check"),
    "tiny": (
        lambda x: {"image": x[:, :13, :9]},
        "image shows the subject in 13x13 pixels, less than a patch of 14 of low_encoder: use",
    ),
    "tiny middle": (
        lambda x: {"image": x[:, :13], "fit": "crop"},
        "image shows the subject in 13x13 pixels",
    ),
    "tiny mask": (
        lambda _: {"mask": spot(5), "margin": 0.0},
        "image shows the subject in 5x5 pixels, less than a patch of 14",
    ),
    "empty mask": (lambda _: {"mask": torch.zeros(1, 64, 64)}, "mask 1 marks no subject, as no"),
    "one empty mask": (
        lambda _: {"mask": torch.cat([oval(), oval() * 0.4, oval()])},
        "mask 2 marks no subject",
    ),
    "nan mask": (lambda _: {"mask": nan(1, 128, 128)}, "mask holds values that are not finite"),
    "mask size": (
        lambda _: {"mask": oval(64, 100)},
        "mask is 100x64, the image 128x128: use a mask of the same picture",
    ),
    "mask batch": (
        lambda _: {"mask": oval().repeat(2, 1, 1)},
        "mask has 2 images, the image 3: use one mask, or one for each",
    ),
    "no encoder": (
        lambda _: {"low": None},
        "low_encoder is empty, as what loaded it has no image encoder: use Load Image Encoder",
    ),
    "another kind": (
        lambda _: {"high": type("Other", (), {"model_type": "dinov3"})()},
        "high_encoder is dinov3, which Pinpoint cannot read: use a CLIP or DINOv2",
    ),
    "no embedding": (
        lambda _: {"high": Stranger(last_hidden_state=torch.ones(1, 2, 3))},
        "high_encoder gives no image embedding: use a CLIP or DINOv2",
    ),
    "an embedding for each patch": (
        lambda _: {"high": Stranger(image_embeds=torch.ones(1, 64, 3))},
        "high_encoder is clip_vision_model, which has an embedding for each patch",
    ),
    "not finite": (
        lambda _: {"low": Stranger(image_embeds=nan(1, 3))},
        "low_encoder gives values that are not finite: its file is damaged",
    ),
    "margin": (lambda _: {"margin": torch.nan}, "margin is nan: enter a number from 0 to 1"),
    "fit": (lambda _: {"fit": "stretch"}, "fit is stretch: choose one of pad, crop"),
}


@pytest.mark.parametrize(("change", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_encoded_is_refused_in_a_sentence(
    low: Any, portraits: Tensor, change: Change, said: str
) -> None:
    inputs: dict[str, Any] = {"image": portraits, "low": low, **change(portraits)}
    with pytest.raises(ValueError, match=said) as error:
        encode(**inputs)
    assert "\n" not in str(error.value)


# In a graph


def test_graphs_bring_encoders_and_pictures_together(host: Host, pack: ModuleType) -> None:
    graph = {
        "picture": {
            "class_type": "EmptyImage",
            "inputs": {"width": 96, "height": 64, "color": 255, "batch_size": 2},
        },
        "encoder": {
            "class_type": "PinpointLoadImageEncoder",
            "inputs": {"file_name": weights.low_encoder_file.name, "activation": "auto"},
        },
        "subject": {
            "class_type": "PinpointEncodeSubject",
            "inputs": {**DEFAULTS, "image": ["picture", 0], "low_encoder": ["encoder", 0]},
        },
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["subject", 1]}},
    }
    executor = host.new_executor()
    subject = host.execute(graph, executor).value("subject")
    assert isinstance(subject, pack.nodes.host.subjects.Subject)
    assert subject.low.shape == (2, 64, 128)
    assert {"encoder", "subject"} <= set(host.execute(graph, executor).cached)
