"""Prompt-to-Prompt's mathematics against maps that are written out in full."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SCALE = 0.4
WORDS = 5


@pytest.fixture(scope="module")
def p2p(pack: ModuleType) -> ModuleType:
    return pack.kernels.prompt_to_prompt


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Which tokens belong together

REPLACED = {
    "the same": ("a cat sits", "a cat sits", {(0, 0): 1, (1, 1): 1, (2, 2): 1}),
    "a swap": ("a cat sits", "a dog sits", {(0, 0): 1, (1, 1): 1, (2, 2): 1}),
    "two swaps": ("a red hat", "a blue cap", {(0, 0): 1, (1, 1): 1, (2, 2): 1}),
    "one for three": (
        "a cat sits",
        "a very big dog sits",
        {(0, 0): 1, (1, 1): 1 / 3, (1, 2): 1 / 3, (1, 3): 1 / 3, (2, 4): 1},
    ),
    "two for one": ("a black cat sits", "a dog sits", {(0, 0): 1, (1, 1): 1, (2, 1): 1, (3, 2): 1}),
    "an addition": ("a cat", "a big cat", {(0, 0): 1, (1, 2): 1}),
    "an omission": ("a big cat", "a cat", {(0, 0): 1, (2, 1): 1}),
    "at the end": ("a cat", "a cat in snow", {(0, 0): 1, (1, 1): 1}),
    "nothing before": ("", "a cat", {}),
}


def entries(mapping: Tensor) -> dict[tuple[int, ...], float]:
    return {tuple(place): float(mapping[tuple(place)]) for place in mapping.nonzero().tolist()}


@pytest.mark.parametrize("case", REPLACED.values(), ids=REPLACED)
def test_swapped_words_stand_for_those_in_their_place(p2p: ModuleType, case: tuple) -> None:
    source, target, expected = case
    mapping = p2p.token_mapping(source.split(), target.split(), swapped=True)
    assert mapping.shape == (len(source.split()), len(target.split()))
    assert entries(mapping) == pytest.approx(expected)


@pytest.mark.parametrize("case", REPLACED.values(), ids=REPLACED)
def test_refining_keeps_only_words_that_both_have(p2p: ModuleType, case: tuple) -> None:
    source, target, _ = case
    mapping = p2p.token_mapping(source.split(), target.split(), swapped=False)
    for (row, column), share in entries(mapping).items():
        assert share == 1
        assert source.split()[row] == target.split()[column]
    assert len(entries(mapping)) == len(set(source.split()) & set(target.split()))


def test_a_replaced_map_keeps_its_sum(p2p: ModuleType) -> None:
    mapping = p2p.token_mapping(list("a cat"), list("a doggie"), swapped=True)
    torch.testing.assert_close(mapping.sum(1), torch.ones(5))


# The edit of a map


def edit_of(p2p: ModuleType, *, weight: Tensor | None = None) -> Any:
    """Token 1 of the target takes from 1 and 2 of the source, token 3 keeps its own map."""
    mapping = torch.zeros(4, WORDS)
    mapping[0, 0] = mapping[1, 1] = mapping[2, 1] = mapping[3, 2] = 1
    mapping[3, 4] = 0.5
    return p2p.MapEdit(mapping, torch.ones(WORDS) if weight is None else weight)


def test_taken_columns_are_the_sources_and_others_their_own(p2p: ModuleType) -> None:
    own, source = torch.rand(2, 3, WORDS), torch.rand(2, 3, 4)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, -1.0])
    edited = edit_of(p2p, weight=weight)(own, source)
    taken = [source[..., 0], source[..., 1] + source[..., 2], source[..., 3]]
    columns = [*taken, own[..., 3], source[..., 3] / 2]
    torch.testing.assert_close(edited, torch.stack(columns, -1) * weight)


def test_what_is_not_seen_stays_unseen(p2p: ModuleType) -> None:
    own, source = torch.rand(3, WORDS) + 0.1, torch.rand(3, 4) + 0.1
    own[1, 1] = own[2, 3] = 0
    edited = edit_of(p2p)(own, source)
    assert (edited == 0).equal(own == 0)


def test_repeated_prompts_are_edited_as_one(p2p: ModuleType) -> None:
    """A prompt that stands twice has each token's probability in two halves."""
    own, source = torch.rand(3, WORDS), torch.rand(3, 4)
    edit = edit_of(p2p, weight=torch.arange(1.0, 6.0))
    halves = torch.cat([0.3 * source, 0.7 * source], -1)
    edited = edit.repeated(2, 3)((own / 3).repeat(1, 3), halves)
    torch.testing.assert_close(edited.unflatten(-1, (3, WORDS)).sum(-2), edit(own, source))
    assert edit.repeated(1, 1) is edit


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stands_for_padding(p2p: ModuleType, side: str) -> None:
    own, source = torch.rand(3, 8), torch.rand(3, 6)
    edit = edit_of(p2p).padded(6, 8, side)
    edited = edit(own, source)
    words, given = (slice(3, 8), slice(2, 6)) if side == "left" else (slice(5), slice(4))
    torch.testing.assert_close(edited[:, words], edit_of(p2p)(own[:, words], source[:, given]))
    first, there = (0, 0) if side == "left" else (5, 4)
    assert torch.equal(edited[:, first : first + 2], source[:, there : there + 2])
    # There is one more of the target's.
    assert torch.equal(edited[:, first + 2], own[:, first + 2])
    assert edit_of(p2p).padded(4, 5, side).mapping.shape == (4, 5)


# Attention


def softmax(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.double().mT * SCALE
    return (scores if mask is None else scores + mask).softmax(-1)


def looks(p2p: ModuleType, seed: int, keys: int, text: slice, mask: Tensor | None = None) -> Any:
    return p2p.Looks(randn(seed, 2, 4, 7, 3), randn(seed + 1, 2, 2, keys, 3), mask, text)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_cross_attention_is_published(
    p2p: ModuleType, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(p2p.attention, "largest_scores", 2 * 4 * WORDS * chunk)
    own, source = looks(p2p, 1, WORDS, slice(0, WORDS)), looks(p2p, 3, 4, slice(0, 4))
    v = randn(5, 2, 2, WORDS, 3)
    edit = edit_of(p2p, weight=torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0]))
    found = p2p.edited_attention(own, source, v, edit, SCALE)
    maps = edit(softmax(*own[:2]).float(), softmax(*source[:2]).float())
    torch.testing.assert_close(found, maps @ v.repeat_interleave(2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [slice(0, WORDS), slice(6, 6 + WORDS)])
@pytest.mark.parametrize("factor", [1.0, 8.0, -3.0], ids=["some", "more than all", "negative"])
def test_joint_attention_still_sums_to_one(p2p: ModuleType, text: slice, factor: float) -> None:
    """Words that would be more than the whole are all that is left."""
    own, source = looks(p2p, 1, 14, text), looks(p2p, 3, 12, slice(0, 4))
    weight = factor * torch.tensor([1.0, 1.5, 0.5, 1.0, 1.0])
    v, edit = randn(5, 2, 2, 14, 3), edit_of(p2p, weight=weight)
    maps = softmax(*own[:2]).float()
    words = edit(maps[..., text], softmax(*source[:2]).float()[..., :4])
    share = words.sum(-1, keepdim=True)
    assert bool((share > 1).any()) == (factor == 8)
    words = torch.where(share > 1, words / share, words)
    rest = maps.clone()
    rest[..., text] = 0
    maps = rest / rest.sum(-1, keepdim=True) * (1 - words.sum(-1, keepdim=True))
    maps[..., text] = words
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4, 7))
    found = p2p.edited_attention(own, source, v, edit, SCALE)
    torch.testing.assert_close(found, maps @ v.repeat_interleave(2, 1), rtol=1e-4, atol=1e-5)
    # Values that are all the same come out as they are, whatever they are weighted by.
    ones = p2p.edited_attention(own, source, torch.ones_like(v), edit, SCALE)
    torch.testing.assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("keys", [WORDS, 14])
def test_the_same_prompt_changes_nothing(p2p: ModuleType, keys: int) -> None:
    own, v = looks(p2p, 1, keys, slice(0, WORDS)), randn(5, 2, 2, keys, 3)
    edit = p2p.MapEdit(torch.eye(WORDS), torch.ones(WORDS))
    found = p2p.edited_attention(own, own, v, edit, SCALE)
    expected = softmax(*own[:2]).float() @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_masks_of_both_count(p2p: ModuleType) -> None:
    """What the target may not see it does not see, though the source does."""
    hidden = torch.zeros(2, 1, 7, WORDS)
    hidden[:, :, 2:5, 0] = -torch.inf
    dimmed = randn(9, 2, 1, 1, 4)
    own = looks(p2p, 1, WORDS, slice(0, WORDS), hidden)
    source = looks(p2p, 3, 4, slice(0, 4), dimmed)
    v = torch.zeros(2, 2, WORDS, 3)
    v[:, :, 0] = 1
    found = p2p.edited_attention(own, source, v, edit_of(p2p), SCALE)
    assert not found[:, :, 2:5].any()
    expected = softmax(source.q, source.k, dimmed).float()[..., :1].expand(-1, -1, -1, 3).clone()
    expected[:, :, 2:5] = 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Local blend


def test_a_words_area_is_its_grown_heat(p2p: ModuleType) -> None:
    heat = torch.zeros(2, 1, 4, 4)
    heat[0, 0, 0, 0], heat[0, 0, 3, 3] = 0.2, 0.05
    heat[1, 0, 2, 1] = 7.0
    area = p2p.word_area(heat, (8, 8), 0.3)
    expected = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    expected[0, :, :4, :4] = True
    expected[1, :, 2:, :6] = True
    assert area.equal(expected)
    assert not p2p.word_area(torch.zeros(1, 1, 4, 4), (8, 8), 0.3).any()


def test_a_films_area_is_of_each_frame(p2p: ModuleType) -> None:
    heat = torch.zeros(1, 3, 4, 4)
    heat[0, 1, 0, 0] = 1.0
    area = p2p.word_area(heat, (3, 8, 8), 0.3)
    assert area.shape == (1, 1, 3, 8, 8)
    assert area[0, 0].any(-1).any(-1).tolist() == [False, True, False]
