"""Learned words in prompts: their vectors where their names stand, all else as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock, text_encoders, tiny_clip
from host.inprocess import Host
from host.text_encoders import CLIPS, READABLE, Encoder

WIDTH = tiny_clip.CONFIG["hidden_size"]


def vectors(count: int, seed: int = 1, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def words(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.words


@pytest.fixture
def ann() -> Tensor:
    return vectors(1)


@pytest.fixture
def clip(host: Host, words: ModuleType, ann: Tensor) -> Any:  # noqa: ARG001
    """Knows <ann>, one vector, and <Bea-2>, two."""
    known = {"ann": {"l": ann}, "Bea-2": {"l": vectors(2, 2)}}
    return words.with_words(tiny_clip.clip(), known)


@pytest.fixture(scope="module")
def encoder(host: Host) -> Iterator[Encoder]:  # noqa: ARG001
    with text_encoders.encoders() as make:
        yield make


def learned(tokens: dict[str, Any], key: str = "l") -> Iterator[tuple[int, Tensor, float]]:
    """Place, vector and weight of the tokens that are vectors."""
    entries = [entry for section in tokens[key] for entry in section]
    for place, (token, weight, *_) in enumerate(entries):
        if torch.is_tensor(token):
            yield place, token, weight


def test_a_prompt_without_a_word_is_encoded_as_before(clip: Any) -> None:
    plain = tiny_clip.clip()
    for text in ("a photo of a (red:1.3) hat", "", "a < b > c", "ann"):
        assert clip.tokenize(text) == plain.tokenize(text)
        ((cond, entries),) = stock.call("CLIPTextEncode", clip=clip, text=text)[0]
        ((expected, others),) = stock.call("CLIPTextEncode", clip=plain, text=text)[0]
        assert torch.equal(cond, expected)
        assert entries.keys() == others.keys()


def test_the_original_does_not_learn(words: ModuleType, clip: Any) -> None:
    plain = tiny_clip.clip()
    before = plain.tokenize("a photo of <ann>")
    assert words.known_words(clip) == ["ann", "bea-2"]
    assert words.known_words(plain) == []
    assert not list(learned(before))
    more = words.with_words(clip, {"cid": {"l": vectors(1, 3)}})
    assert words.known_words(more) == ["ann", "bea-2", "cid"]
    assert words.known_words(clip) == ["ann", "bea-2"]


@pytest.mark.parametrize(
    ("text", "place", "weight"),
    [
        ("<ann>", 1, 1.0),
        ("<ANN> in a hat", 1, 1.0),
        ("a photo of <ann>, smiling", 4, 1.0),
        ("a photo of (<ann>:1.3) smiling", 4, 1.3),
        ("a photo of ((<ann>)) smiling", 4, 1.1**2),
        ("a photo of (a <ann> person:0.5)", 5, 0.5),
        ("a photo(<ann>)", 3, 1.1),
        ("young<ann>ish", 2, 1.0),
        ("\\(<ann>\\)", 2, 1.0),
        ("a 'river' by the window with <ann>", 9, 1.0),
        ("a\n<ann>\nb", 2, 1.0),
        ("<ann>'s hat", 1, 1.0),
    ],
)
def test_a_word_stands_where_it_is_written(
    clip: Any, ann: Tensor, text: str, place: int, weight: float
) -> None:
    ((found, vector, its_weight),) = learned(clip.tokenize(text))
    assert found == place
    assert its_weight == pytest.approx(weight)
    assert torch.equal(vector, ann[0])
    assert [len(section) for section in clip.tokenize(text)["l"]] == [77]


def test_other_words_are_the_tokens_that_they_are_without(clip: Any) -> None:
    with_word = clip.tokenize("a (photo:1.2) of <ann> in a hat")["l"][0]
    with_other = clip.tokenize("a (photo:1.2) of someone in a hat")["l"][0]
    different = [i for i, pair in enumerate(zip(with_word, with_other, strict=True)) if i == 4]
    assert different == [4]
    assert with_word[:4] + with_word[5:] == with_other[:4] + with_other[5:]


def test_several_words_and_the_same_one_again(clip: Any, ann: Tensor) -> None:
    tokens = clip.tokenize("<ann> beside <bea-2> and again <ann><Bea-2>")
    both = vectors(2, 2)
    expected = [*ann, *both, *ann, *both]
    found = list(learned(tokens))
    assert [place for place, _, _ in found] == [1, 3, 4, 7, 8, 9]
    assert all(torch.equal(v, e) for (_, v, _), e in zip(found, expected, strict=True))


def test_word_ids_are_kept(clip: Any) -> None:
    section = clip.tokenize("of <ann> (in:1.2) a hat", return_word_ids=True)["l"][0]
    assert [word for _, _, word in section[:7]] == [0, 1, 1, 2, 3, 3, 0]


def test_a_long_prompt_keeps_its_sections(words: ModuleType, clip: Any) -> None:
    text = "a very long text " * 40 + "<ann> " + "and more of it " * 30
    tokens = clip.tokenize(text)
    assert {len(section) for section in tokens["l"]} == {77}
    ((place, _, _),) = learned(tokens)
    # Each section begins and ends with a token of its own.
    assert place == 1 + 160 + 2 * (160 // 75)
    ((cond, entries),) = clip.encode_from_tokens_scheduled(tokens)
    assert entries[words.words_key] == {"ann": [place]}
    assert cond.shape[1] == 77 * len(tokens["l"]) > 77 * 3


def test_an_encoding_is_that_of_the_vectors_and_says_where_they_are(
    words: ModuleType,
) -> None:
    """A vector out of the encoder's own table is the word that it belongs to."""
    plain = tiny_clip.clip()
    (number,) = {e[0] for e in plain.tokenize("cat")["l"][0]} - {49406, 49407}
    table = plain.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    cat = words.with_words(plain, {"felix": {"l": table[number : number + 1].clone()}})
    for text in ("a {} on a mat", "a ({}:1.4) on a {} mat"):
        ((cond, entries),) = stock.call(
            "CLIPTextEncode", clip=cat, text=text.replace("{}", "<felix>")
        )[0]
        ((expected, _),) = stock.call("CLIPTextEncode", clip=plain, text=text.replace("{}", "cat"))[
            0
        ]
        assert torch.equal(cond, expected)
        rows = entries[words.words_key]["felix"]
        assert rows == [2, 5][: text.count("{}")]


def test_clones_and_stock_nodes_keep_the_words(words: ModuleType, clip: Any) -> None:
    layer = stock.call("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)[0]
    for kept in (clip.clone(), layer, layer.clone()):
        ((_, entries),) = stock.call("CLIPTextEncode", clip=kept, text="a <ann>")[0]
        assert entries[words.words_key] == {"ann": [2]}
    assert layer.layer_idx == -2


def test_an_unknown_name_stays_text_and_is_warned_of(
    clip: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tiny_clip.clip()
    with caplog.at_level(logging.WARNING):
        assert plain.tokenize("a <bob>") == clip.tokenize("a <bob>")
        (place, _, _) = next(learned(clip.tokenize("<bob> with <ann>")))
    assert place == 5
    assert [r.message for r in caplog.records] == [
        "Pinpoint: no identity of the name bob is applied: <bob> stays text"
    ] * 2


def test_gradients_reach_the_vectors(words: ModuleType) -> None:
    import comfy.sd

    parameter = torch.nn.Parameter(vectors(2, 5))
    with torch.inference_mode(False), torch.enable_grad():
        options = {"model_config": tiny_clip.CONFIG}
        fresh = comfy.sd.load_text_encoder_state_dicts(
            [tiny_clip._weights()], model_options=options
        )
        clip = words.with_words(fresh, {"ann": {"l": parameter}})
        # ComfyUI's CLIP adds in place to what autograd keeps.
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            tokens = clip.tokenize("a photo of <ann> here")
            ((cond, _),) = clip.encode_from_tokens_scheduled(tokens)
        cond.square().sum().backward()
    assert parameter.grad is not None
    assert (parameter.grad.abs().sum(1) > 0).all()


# In every text encoder. Flux.2's tokenizer of the tests has bytes only, and no words.


def for_all(pack: ModuleType, clip: Any, count: int, seed: int) -> dict[str, Tensor]:
    """Vectors for each loaded text encoder, of other numbers in each."""
    width = pack.nodes.host.encoders.width
    widths = {key: width(clip, key) for key in clip.tokenize("")}
    loaded = {key: size for key, size in widths.items() if size is not None}
    return {
        key: vectors(count + i, seed, size) for i, (key, size) in enumerate(sorted(loaded.items()))
    }


@pytest.mark.parametrize("name", [n for n in CLIPS + READABLE if n != "flux2"])
@pytest.mark.parametrize(
    "text",
    [
        "a photo of <ann> in a hat",
        "<ann>",
        "(<ann>:1.3), <ann>'s hat\nand <bea>",
        "a river, a window; <ann> " + "on the one hand, " * 30 + "(<ANN>) and <bea>.",
    ],
    ids=["one", "alone", "weights", "long"],
)
def test_marked_rows_are_those_that_change_with_the_vectors(
    pack: ModuleType, words: ModuleType, encoder: Encoder, name: str, text: str
) -> None:
    clip = encoder(name)
    rows, bea = [], for_all(pack, clip, 1, 50)
    for seed in (1, 2):
        knowing = words.with_words(clip, {"ann": for_all(pack, clip, 1, seed), "bea": bea})
        ((cond, entries),) = stock.call("CLIPTextEncode", clip=knowing, text=text)[0]
        rows.append((cond[0], entries[words.words_key]))
    (first, marked), (second, again) = rows
    assert marked == again
    assert (first != second).any(-1).nonzero().flatten().tolist() == marked["ann"]
    assert marked.keys() == {word for word in ("ann", "bea") if f"<{word}>" in text}


def test_a_text_encoder_without_vectors_reads_the_prompt_without_the_word(
    pack: ModuleType, words: ModuleType, encoder: Encoder
) -> None:
    clip = encoder("flux")
    vectors_of = for_all(pack, clip, 1, 1)
    only_t5 = words.with_words(clip, {"ann": {"t5xxl": vectors_of["t5xxl"]}})
    # T5 begins with a token for the space before "a".
    tokens, plain = only_t5.tokenize("a <ann> person"), clip.tokenize("a person")
    assert tokens["l"] == plain["l"]
    assert [place for place, _, _ in learned(tokens, "t5xxl")] == [2, 3]


def test_a_prompt_that_no_stand_in_passes_is_refused(
    pack: ModuleType, words: ModuleType, encoder: Encoder
) -> None:
    clip = encoder("flux2")
    knowing = words.with_words(clip, {"Ann": for_all(pack, clip, 1, 1)})
    with pytest.raises(ValueError, match="clip cannot place <ann>, because its tokenizer changes"):
        knowing.tokenize("a photo of <Ann>")


def test_a_prompt_with_all_stand_ins_is_refused(
    pack: ModuleType, words: ModuleType, encoder: Encoder
) -> None:
    clip = encoder("sd3")
    knowing = words.with_words(clip, {"ann": for_all(pack, clip, 1, 1)})
    with pytest.raises(ValueError, match="prompt has all of the words river, window"):
        knowing.tokenize("<ann>, " + " ".join(words._stand_ins))


def test_words_of_attention_mask_are_found_beside_learned_ones(
    pack: ModuleType, words: ModuleType, encoder: Encoder
) -> None:
    """And the learned ones by their names."""
    clip = encoder("sdxl")
    knowing = words.with_words(clip, {"ann": for_all(pack, clip, 2, 1)})
    find = pack.nodes.host.phrases.encode_with_positions
    positions = find(knowing, "a photo of <ann> in a red hat", ["red hat", "<ann>"], "t").positions
    # Three vectors in CLIP-L, two in CLIP-G, side by side.
    assert positions == {"<ann>": [4, 5, 6], "red hat": [8, 9, 10]}
