"""Learn Identity: what it learns from, and what it refuses before it learns."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from host import lessons, stock, tiny_clip
from host.lessons import PICTURE, Learned, assert_same
from host.photographs import astronaut

QUICK: dict[str, Any] = dict(token_steps=1, steps=0)


@pytest.mark.parametrize(
    "shapes",
    [[(1, 64, 64, 4)], [(1, 64, 64, 1)], [(2, 64, 64, 3)], [(1, 64, 96, 3), (2, 48, 64, 3)]],
    ids=["RGBA", "grey", "batch", "sizes"],
)
def test_learns_from_all_kinds_of_pictures(learned: Learned, shapes: list[tuple[int, ...]]) -> None:
    drawn = torch.Generator().manual_seed(1)
    images = [torch.rand(shape, generator=drawn) for shape in shapes]
    identity, preview, _, _ = learned(images, preservation=0.0)
    assert identity.lora
    assert preview.shape == (1, *shapes[0][1:3], 3)
    assert torch.isfinite(preview).all()


def test_a_photograph_is_learned_and_worn(learned: Learned, tiny_model: Any) -> None:
    image = astronaut(128)
    face = torch.zeros(1, 128, 128)
    face[:, 5:75, 30:90] = 1
    identity, preview, curve, report = learned(image, mask=face, steps=4, token_steps=4)
    assert torch.isfinite(preview).all()
    assert torch.isfinite(curve).all()
    assert lessons.number_in(report, r"([\d.]+) at the end") > 0
    model, clip = stock.call(
        "PinpointApplyIdentity",
        model=tiny_model("sd3_bare"),
        clip=tiny_clip.clip(),
        identity=identity,
        strength=1.0,
        name="",
        mask=face,
    )
    assert model.patches
    text = stock.call("CLIPTextEncode", clip=clip, text="a <ann> person with a hat")[0][0][0]
    assert torch.isfinite(text).all()


def test_transparent_places_are_white(learned: Learned) -> None:
    clear = torch.cat([PICTURE, torch.zeros(1, 64, 64, 1)], -1)
    white = torch.ones_like(PICTURE)
    assert_same(learned(clear, **QUICK)[0].vectors, learned(white, **QUICK)[0].vectors)


def test_large_pictures_are_scaled_down(learned: Learned) -> None:
    image = torch.rand(1, 256, 128, 3)
    assert learned(image, resolution=64, **QUICK)[1].shape == (1, 88, 48, 3)


def test_each_picture_has_its_prompt(learned: Learned) -> None:
    prompts = ["a person", "a <ann> person with a hat"]
    identity = learned(PICTURE.repeat(2, 1, 1, 1), prompt=prompts, **QUICK)[0]
    assert identity.recipe["prompt"] == "a <ann> person"


@pytest.mark.parametrize(
    ("prompt", "class_word", "expected"),
    [
        ("一个人的照片", "人", "一个<ann> 人的照片"),
        ("a Person, personally", "person", "a <ann> Person, personally"),
        ("a (person:1.2)", "person", "a (<ann> person:1.2)"),
        ("photo of <ANN>, <Ann>", "person", "photo of <ann>, <ann>"),
    ],
)
def test_word_is_placed(pack: ModuleType, prompt: str, class_word: str, expected: str) -> None:
    assert pack.nodes.host.lessons.placed(prompt, "ann", class_word) == expected


def test_variations_leave_out_clauses_and_add_attributes(pack: ModuleType) -> None:
    variations = pack.nodes.host.word_learning.variations
    assert variations("a <ann> person, red hat, smiling", "ann", ["old"]) == [
        "a <ann> person, smiling",
        "a <ann> person, red hat",
        "a <ann> person, red hat, smiling, old",
    ]
    assert variations("帽子\uff0c<ann> 人\u3001微笑", "ann", []) == [
        "<ann> 人\u3001微笑",
        "帽子\uff0c<ann> 人",
    ]


def test_masks_are_cropped_as_pictures_are(
    pack: ModuleType, demo: stock.Demo, tiny_model: lessons.TinyModel
) -> None:
    """VAE Encode leaves 64 of 71 pixels, without 3 at the top and at the left."""
    material = pack.nodes.host.lessons.Material
    image, mask = torch.rand(1, 71, 71, 3), torch.zeros(1, 71, 71)
    mask[:, 3:11, 3:11] = 1
    expected = torch.zeros(1, 64, 64)
    expected[:, :8, :8] = 1
    with torch.inference_mode():
        for given in (mask, expected):
            made = material([image], [given], ["a person"], 512)
            (found,) = made.pictures(tiny_model("sd3_bare"), demo.vae, "ann", "person")
            assert torch.equal(found.mask, expected)


def test_known_words_and_attributes_stand_for_their_vectors(pack: ModuleType) -> None:
    word_learning = pack.nodes.host.word_learning
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    clip = pack.nodes.host.words.with_words(tiny_clip.clip(), {"bea": {"l": vectors}})
    found = word_learning.embedded(clip, "hat <Bea>", "attributes")["l"]
    assert torch.equal(found[1:], vectors)
    assert torch.equal(found[:1], word_learning.embedded(clip, "hat", "attributes")["l"])
    with pytest.raises(ValueError, match=r"attributes has <eva>, which the clip does not know"):
        word_learning.embedded(clip, "a <eva>", "attributes")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "1x1": ({"image": torch.rand(1, 1, 1, 3)}, "image is 1x1"),
    "channels": ({"image": torch.rand(1, 64, 64, 2)}, "image has 2 channels"),
    "not finite": ({"image": torch.full((1, 64, 64, 3), torch.nan)}, "not finite"),
    "no class word": ({"prompt": "a cat"}, "neither <ann> nor the class_word 'person'"),
    "no class": ({"prompt": "a cat", "class_word": " "}, "class_word and start_word are both"),
    "no place": (
        {"prompt": "a cat", "class_word": "", "start_word": "cat"},
        "prompt is 'a cat', which has no <ann>: write for example 'photo of a <ann> person'",
    ),
    "start word": ({"start_word": "<eva>"}, "start_word has <eva>, which the clip does not"),
    "no tokens": ({"start_word": "()"}, "start_word has '()', for which the text encoder has no"),
    "attribute": ({"attributes": "()"}, "attributes has '()', for which the text encoder has no"),
    "prompts": ({"prompt": ["a person"] * 3}, "3 prompts for 1 pictures"),
    "name": ({"name": "a b"}, "name is 'a b'"),
    "no name": ({"name": " "}, "name is ''"),
    "long name": ({"name": "a" * 101}, "name has 101 letters: write one of at most 100"),
    "empty mask": ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
    "masks": ({"mask": torch.ones(2, 64, 64)}, "2 masks for 1 pictures"),
    "no steps": ({"steps": 0, "token_steps": 0}, "both 0"),
    "no rate": ({"token_rate": 0.0}, "token_rate is 0, so 2 token_steps"),
    "no clip": ({"clip": None}, "clip is empty"),
    "no vae": ({"vae": None}, "vae is empty"),
    "rank": ({"rank": 0}, "rank is 0"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_sentence(learned: Learned, case: tuple[dict[str, Any], str]) -> None:
    changed, sentence = case
    with pytest.raises(ValueError, match=re.escape(sentence)):
        learned(**changed)


def test_refuses_before_anything_is_encoded(learned: Learned, pack: ModuleType) -> None:
    first = learned(**QUICK)[0]
    sizes = [torch.rand(1, 64, 64, 3), torch.rand(1, 16, 64, 3)]

    def encoded(*_: Any) -> None:
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.nodes.host.arguments, "latent_samples", encoded)
        for given, message in (
            ({"attributes": "hair, <zed>"}, "attributes has <zed>, which the clip does not know"),
            ({"start_word": "<zed>"}, "start_word has <zed>, which the clip does not know"),
            ({"identity": replace(first, family="Flux")}, "learned with Flux, the model is SD3"),
            ({"image": sizes}, "image is 64x16"),
        ):
            with pytest.raises(ValueError, match=message):
                learned(**{"image": PICTURE, **given})


def test_words_that_are_not_read_may_be_unknown(learned: Learned) -> None:
    first = learned(**QUICK)[0]
    assert learned(identity=first, start_word="<zed>", **QUICK)
    assert learned(attributes="<zed>", orthogonality=0.0, preservation=0.0, **QUICK)


def test_refuses_a_name_that_is_taken(learned: Learned, pack: ModuleType) -> None:
    words = pack.nodes.host.words
    clip = words.with_words(tiny_clip.clip(), {"Ann": {"l": torch.ones(1, 64)}})
    with pytest.raises(ValueError, match="name is ann, and the clip knows another identity"):
        learned(clip=clip)


def test_refuses_a_model_that_cannot_be_loaded_again(
    learned: Learned, tiny_model: lessons.TinyModel
) -> None:
    model = tiny_model("sd3_bare").clone()
    model.cached_patcher_init = None
    with pytest.raises(ValueError, match="model comes from a loader that cannot load it a second"):
        learned(model=model)
