"""Where a prompt's words lie in its conditioning, in text encoders that are free of context."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from host import stock, text_encoders
from host.text_encoders import CLIPS, READABLE, Encoder


@pytest.fixture(scope="module")
def encoder(host: Any) -> Iterator[Encoder]:  # noqa: ARG001
    """A function that makes one of ComfyUI's text encoders, small and free of context."""
    with text_encoders.encoders() as make:
        yield make


@pytest.fixture(scope="module")
def phrases(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.phrases


def rows(clip: Any, text: str) -> Tensor:
    """The conditioning of a prompt, (tokens, width), as ComfyUI's own node makes it."""
    return stock.call("CLIPTextEncode", clip=clip, text=text)[0][0][0][0]


def changed(clip: Any, text: str, other: str) -> list[int]:
    """Rows in which two prompts' conditionings differ."""
    ours, theirs = rows(clip, text), rows(clip, other)
    assert ours.shape == theirs.shape
    return (ours != theirs).any(-1).nonzero().flatten().tolist()


def spelled(clip: Any, encoded: Any, phrase: str) -> str:
    """What the conditioning's rows at a phrase's positions say, spaces and capitals aside."""
    ids = [int(encoded.conditioning[0][0][0, at, 0]) for at in encoded.positions[phrase]]
    tokenizer = clip.tokenizer
    words = tokenizer.t5xxl if hasattr(tokenizer, "t5xxl") else getattr(tokenizer, tokenizer.clip)
    return "".join(words.decode(ids).casefold().split())


@pytest.mark.parametrize("name", CLIPS + READABLE)
class TestPositions:
    def test_rows_are_those_that_change_with_the_words(
        self, phrases: ModuleType, encoder: Encoder, name: str
    ) -> None:
        clip, text = encoder(name), "portrait of caps, {}, an escape, {} shredded, a captain"
        prompt = text.format("red cap", "red cap")
        encoded = phrases.encode_with_positions(clip, prompt, ["Red  cap"], "target")
        expected = changed(clip, prompt, text.format("big dog", "big dog"))
        assert expected
        assert encoded.positions == {"Red  cap": expected}

    def test_words_are_all_but_punctuation_and_the_encoders_own_tokens(
        self, phrases: ModuleType, encoder: Encoder, name: str
    ) -> None:
        clip = encoder(name)
        encoded = phrases.encode_with_positions(clip, "big dog, old cap.", [], "target")
        assert encoded.words == changed(clip, "big dog, old cap.", "red cat, new sun.")

    def test_long_prompts(self, phrases: ModuleType, encoder: Encoder, name: str) -> None:
        clip, text = encoder(name), "on the one hand, " * 40 + "{}, " + "and so on, " * 40
        encoded = phrases.encode_with_positions(clip, text.format("red cap"), ["red cap"], "target")
        assert encoded.positions["red cap"][0] > 160
        assert encoded.positions["red cap"] == changed(
            clip, text.format("red cap"), text.format("big dog")
        )

    def test_conditioning_is_the_stock_nodes(
        self, phrases: ModuleType, encoder: Encoder, name: str
    ) -> None:
        clip, text = encoder(name), "a (red cap:1.3), \\(old\\)"
        [[tensor, extras]] = phrases.encode_with_positions(clip, text, ["cap"], "t").conditioning
        [[expected, others]] = stock.call("CLIPTextEncode", clip=clip, text=text)[0]
        assert torch.equal(tensor, expected)
        assert extras.keys() == others.keys()

    def test_weights_and_escaped_brackets(
        self, phrases: ModuleType, encoder: Encoder, name: str
    ) -> None:
        clip, text = encoder(name), "a person, (({} and:1.2) shoes), \\({}\\)"
        prompt = text.format("red cap", "red cap")
        found = phrases.encode_with_positions(
            clip, prompt, ["red cap", "(red cap:1.2)", "\\(red cap\\)", "red cap and"], "target"
        ).positions
        expected = changed(clip, prompt, text.format("big dog", "big dog"))
        assert found["red cap"] == found["(red cap:1.2)"] == expected
        assert set(found["\\(red cap\\)"]) & set(expected) == set(expected) - set(
            found["red cap and"]
        )


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize(
    "phrase",
    [
        "t-shirt",
        "crow's feet",
        "hat",
        "blue hüte",
        "2024",
        "24",
        "red",
        "(old)",
        "jalousie",
    ],
)
def test_rows_spell_the_phrase(
    phrases: ModuleType, encoder: Encoder, name: str, phrase: str
) -> None:
    prompt = (
        "A person in a T-shirt with crow's feet, that hat, hats; blue\nHüte, in 2024 "
        "and 24 from 1024, reddish red (old) jalousie"
    )
    clip = encoder(name)
    encoded = phrases.encode_with_positions(
        clip, prompt.replace("(old)", "\\(old\\)"), [phrase], "t"
    )
    assert spelled(clip, encoded, phrase) == "".join(phrase.casefold().split())


def test_clip_takes_numbers_and_words_apart(phrases: ModuleType, encoder: Encoder) -> None:
    clip = encoder("sd15")
    prompt = "crow's feet, t-shirt, 24 of 2024, crow feet, mp4"
    found = phrases.encode_with_positions(
        clip, prompt, ["crow's feet", "t-shirt", "24", "mp4"], "t"
    ).positions
    assert found == {
        "crow's feet": [1, 2, 3],
        "t-shirt": [5, 6, 7],
        "24": [9, 10],
        "mp4": [20, 21],
    }


@pytest.mark.parametrize("name", ["sd15", "qwen_image", "wan"])
def test_scripts_without_spaces(phrases: ModuleType, encoder: Encoder, name: str) -> None:
    clip = encoder(name)
    text = "一个戴{}的女人\uff0c蓝衬衫"
    encoded = phrases.encode_with_positions(clip, text.format("红帽子"), ["红帽子"], "t")
    assert set(encoded.positions["红帽子"]) < set(encoded.words)
    without = phrases.encode_with_positions(clip, text.format(""), [], "t").words
    assert len(encoded.words) - len(without) == len(encoded.positions["红帽子"])


@pytest.mark.parametrize("name", ["lumina2", "wan"])
def test_characters_in_pieces(phrases: ModuleType, encoder: Encoder, name: str) -> None:
    clip = encoder(name)
    encoded = phrases.encode_with_positions(clip, "一个戴红帽👒的女人", ["帽"], "t")
    assert len(encoded.positions["帽"]) == 3
    assert spelled(clip, encoded, "帽") == "帽"


@pytest.mark.parametrize("phrase", ["piñata", "帽子", "naïve view", "Ärmel"])
def test_letters_that_t5_does_not_know(phrases: ModuleType, encoder: Encoder, phrase: str) -> None:
    clip, text = encoder("flux"), "portrait with {}, red cap, 蓝色"
    prompt = text.format(phrase)
    found = phrases.encode_with_positions(clip, prompt, [phrase, "red cap"], "t").positions
    start, stop = min(found[phrase]), max(found[phrase]) + 1
    assert found[phrase] == list(range(start, stop))
    assert start in (2, 3)
    assert found["red cap"][0] == stop + 1


@pytest.fixture(scope="module")
def textual_inversions(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("embeddings")
    save_file({"emb_params": torch.ones(3, 64)}, folder / "fits.safetensors")
    save_file({"emb_params": torch.ones(2, 32)}, folder / "other.safetensors")
    return str(folder)


@pytest.mark.parametrize("before", ["embedding:fits", "embedding:other", "embedding:gone"])
@pytest.mark.parametrize("between", ["", "on the one hand, " * 20])
def test_textual_inversions(
    phrases: ModuleType, encoder: Encoder, textual_inversions: str, before: str, between: str
) -> None:
    clip, text = encoder("sd15", textual_inversions), f"a {before}, {between}{{}} and that"
    found = phrases.encode_with_positions(clip, text.format("red cap"), ["red cap"], "t").positions
    assert found["red cap"] == changed(clip, text.format("red cap"), text.format("big dog"))


def test_a_textual_inversion_is_its_vectors(
    phrases: ModuleType, encoder: Encoder, textual_inversions: str
) -> None:
    clip, phrase = encoder("sd15", textual_inversions), "embedding:fits"
    encoded = phrases.encode_with_positions(clip, f"a hat, {phrase} of old", [phrase], "t")
    assert encoded.positions[phrase] == [4, 5, 6]


@pytest.mark.parametrize("longest", [{"clip_l_max_length": 248}, {"clip_g_max_length": 40}])
def test_clips_of_different_lengths(
    phrases: ModuleType, encoder: Encoder, longest: dict[str, int]
) -> None:
    clip, text = encoder("sdxl", **longest), "on the one hand, " * 18 + "{}" + " and so on" * 10
    found = phrases.encode_with_positions(clip, text.format("red cap"), ["red cap"], "t").positions
    assert found["red cap"] == changed(clip, text.format("red cap"), text.format("big dog"))


class TestRefusals:
    def test_phrase_that_is_not_in_the_prompt(self, phrases: ModuleType, encoder: Encoder) -> None:
        message = (
            r"^added_phrases has 'hat', which is not in target_prompt \('portrait of hats'\): use "
            r"words of that prompt$"
        )
        with pytest.raises(ValueError, match=message):
            phrases.encode_with_positions(
                encoder("sd15"), "portrait of hats", ["hat"], "target_prompt", "added_phrases"
            )

    def test_phrase_without_tokens(
        self, phrases: ModuleType, encoder: Encoder, textual_inversions: str
    ) -> None:
        clip = encoder("sd15", textual_inversions)
        with pytest.raises(ValueError, match=r"embedding:gone', for which .* has no tokens"):
            phrases.encode_with_positions(clip, "a embedding:gone", ["embedding:gone"], "t")

    @pytest.mark.parametrize("text", ["", " \n"])
    def test_empty_prompt(self, phrases: ModuleType, encoder: Encoder, text: str) -> None:
        with pytest.raises(ValueError, match="source_prompt is empty: describe"):
            phrases.encode_with_positions(encoder("sd15"), text, [], "source_prompt")

    def test_no_text_encoder(self, phrases: ModuleType) -> None:
        with pytest.raises(ValueError, match=r"clip is empty.*use Load CLIP"):
            phrases.encode_with_positions(None, "a hat", [], "t")

    def test_unknown_text_encoder(self, phrases: ModuleType) -> None:
        from comfy.text_encoders.ovis import OvisTEModel

        clip = SimpleNamespace(cond_stage_model=OvisTEModel.__new__(OvisTEModel))
        with pytest.raises(ValueError, match=r"clip is OvisTEModel, .* load the text encoder of"):
            phrases.encode_with_positions(clip, "a hat", [], "t")

    def test_conditioning_of_another_length(
        self, phrases: ModuleType, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clip = encoder("sd15").clone()
        encode = clip.encode_from_tokens_scheduled
        shortened = lambda tokens: [[encode(tokens)[0][0][:, 1:], {}]]  # noqa: E731
        monkeypatch.setattr(clip, "encode_from_tokens_scheduled", shortened)
        with pytest.raises(ValueError, match="clip made 76 tokens where its tokenizer made"):
            phrases.encode_with_positions(clip, "a hat", [], "t")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" red hat ,, blue  shirt\n\nhat,Red hat", ["red hat", "blue shirt", "hat"]),
        ("红帽子\uff0c蓝衬衫", ["红帽子", "蓝衬衫"]),
    ],
)
def test_split_phrases(phrases: ModuleType, text: str, expected: list[str]) -> None:
    assert phrases.split_phrases(text) == expected


@pytest.mark.parametrize(
    ("source", "target", "words", "clauses"),
    [
        (
            "portrait of a person, red hat, blue shirt",
            "portrait of a person, green hat, blue shirt",
            (["red"], ["green"]),
            (["red hat"], ["green hat"]),
        ),
        (
            "A person. Blue shirt",
            "a person with a T-shirt, round glasses; blue shirt.",
            ([], ["with a T-shirt", "round glasses"]),
            ([], ["a person with a T-shirt", "round glasses"]),
        ),
        ("a (hat:1.2), \\(old\\)", "a hat, (old)", ([], []), ([], [])),
        ("crow's feet", "crows feet", (["crow's"], ["crows"]), (["crow's feet"], ["crows feet"])),
        ("戴红帽子的人", "戴绿帽子的人", (["红"], ["绿"]), (["戴红帽子的人"], ["戴绿帽子的人"])),
        ("red, red", "blue, blue", (["red"], ["blue"]), (["red"], ["blue"])),
        ("", "hat", ([], ["hat"]), ([], ["hat"])),
    ],
)  # fmt: skip
def test_changed_phrases(
    phrases: ModuleType, source: str, target: str, words: Any, clauses: Any
) -> None:
    assert phrases.changed_phrases(source, target) == words
    assert phrases.changed_phrases(source, target, whole=True) == clauses
    assert phrases.changed_phrases(target, source) == words[::-1]


def test_changed_phrases_are_found(phrases: ModuleType, encoder: Encoder) -> None:
    source = 'a (person:1.2) \\(old\\) with "red" hat, it\'s 20 years. Blue!'
    target = "the (woman:1.1) (young) with 'green' cap, it was 30 ... years (Yellow)"
    for name in ("sd15", "qwen_image"):
        for whole in (False, True):
            removed, added = phrases.changed_phrases(source, target, whole=whole)
            for text, found in ((source, removed), (target, added)):
                assert found
                phrases.encode_with_positions(encoder(name), text, found, "t")
