"""A learned word's attention: exactly none outside its mask, and as it was inside."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from host import stock, tiny_clip
from host.edits import left_half, patcher_state, soft_ramp
from host.tapping import COLUMNS, FAMILIES, ROWS, WORDS, Family, Witness, each_of, families, few

TinyModel = Callable[[str], Any]

# In Lumina 2 and Z-Image words are mixed by refiners before the picture sees them.
unrefined = each_of(
    *(name for name, family in FAMILIES.items() if family.model not in ("lumina2", "zimage"))
)
ANN, BEA = [3, 7], [5]
"""Rows of two words."""


@pytest.fixture
def confining(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.confining


@pytest.fixture
def tap(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.tap


def prompt(family: Family, seed: int = 1, **kwargs: Any) -> stock.Conditioning:
    """A prompt in which <ann> and <bea> stand."""
    rows = {"ann": ANN, "bea": BEA}
    return stock.with_values(family.prompt(seed, **kwargs), pinpoint_words=rows)


def with_other_rows(prompt: stock.Conditioning, rows: list[int]) -> stock.Conditioning:
    """The prompt with other vectors in some rows."""
    ((text, entries),) = prompt
    changed = text.clone()
    changed[:, rows] = torch.randn(
        changed[:, rows].shape, generator=torch.Generator().manual_seed(9)
    )
    return [[changed, entries]]


def velocity(model: Any, prompt: stock.Conditioning, x: Tensor, sigma: float = 0.6) -> Tensor:
    return stock.velocity(model, prompt, None, 1.0, x, sigma)


def left(family: Family) -> Tensor:
    """A mask over four of nine columns, of which one token is half inside."""
    return left_half(family.latent()[:1])


def weights(attention: Any) -> Tensor:
    """(B, H, Q, K), by definition."""
    scores = attention.q.double() @ attention.k.double().transpose(2, 3) * attention.scale
    if attention.mask is not None:
        scores = scores + attention.mask
    return scores.softmax(-1)


def inside(attention: Any, mask: Tensor) -> Tensor:
    """(tokens,) the mask on an attention's picture tokens."""
    frames, *grid = attention.place.grid
    return F.interpolate(mask[:, None], grid, mode="area").flatten().repeat(frames)


@families
@pytest.mark.parametrize("shape", [left_half, soft_ramp])
def test_attention_is_none_outside_and_in_proportion_inside(
    confining: ModuleType,
    tap: ModuleType,
    tiny_model: TinyModel,
    family: Family,
    shape: Callable[[Tensor], Tensor],
) -> None:
    witness, mask = Witness(), shape(family.latent())
    model = tap.tapped(tiny_model(family.model), tap.observing(witness))
    velocity(confining.confined(model, "Ann", mask), prompt(family), family.latent())
    columns = [family.words[row] for row in ANN]
    seen = [a for a in witness.attentions if a.place.text is not None]
    assert seen
    for attention in seen:
        own = columns if attention.place.kind == "joint" else []
        allowed = torch.zeros(attention.q.shape[2], dtype=torch.float64)
        allowed[attention.place.image] = inside(attention, mask).double()
        allowed[own] = 1
        found = weights(attention)
        assert (found[:, :, allowed == 0][..., columns] == 0).all()
        free = attention.mask[:, :, :1] * 0
        expected = (attention.q.double() @ attention.k.double().transpose(2, 3)) * attention.scale
        expected = expected.sub(expected.amax(-1, keepdim=True)).exp()
        assert free.isfinite().all()
        expected[..., columns] *= allowed[:, None]
        expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        assert 0 < allowed.mean() < 1


@unrefined
def test_a_word_with_an_empty_mask_has_no_effect_at_all(
    confining: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    model, x = tiny_model(family.model), family.latent()
    nowhere = confining.confined(model, "ann", torch.zeros(1, ROWS, COLUMNS))
    this, other = prompt(family), with_other_rows(prompt(family), ANN)
    assert not torch.equal(velocity(model, this, x), velocity(model, other, x))
    assert torch.equal(velocity(nowhere, this, x), velocity(nowhere, other, x))


@few
def test_a_word_acts_at_once_inside_its_mask_only(
    confining: ModuleType, tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    """In the first block; behind it places tell each other what they have seen."""
    mask, outputs = left(family), []

    def handler(attention: Any, proceed: Any) -> Tensor:
        out = proceed(attention)
        outputs.append((attention, out.clone()))
        return out

    model = confining.confined(tap.tapped(tiny_model(family.model), handler), "ann", mask)
    for text in (prompt(family), with_other_rows(prompt(family), ANN)):
        velocity(model, text, family.latent())
    first, second = (
        next(pair for pair in half if pair[0].place.text is not None)
        for half in (outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :])
    )
    attention = first[0]
    image, allowed = attention.place.image, inside(attention, mask) > 0
    changed = (first[1] != second[1]).any(-1)[0, image]
    assert torch.equal(changed, allowed)
    text = (first[1] != second[1]).any(-1)[0, : image.start]
    assert set(text.nonzero().flatten().tolist()) <= {family.words[row] for row in ANN}


@families
def test_prompts_without_the_word_are_untouched_and_it_is_said(
    confining: ModuleType, tiny_model: TinyModel, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(family.model)
    state, before = patcher_state(model), family.velocity(model)
    confined = confining.confined(model, "ann", left(family))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(family.velocity(confined, 0.6), before)
        assert not caplog.records
        # The first step is where the noise is highest.
        family.velocity(confined, 1.0)
    assert sum("confines <ann>, but no prompt has it" in r.message for r in caplog.records) == 1
    assert torch.equal(family.velocity(model), before)
    assert patcher_state(model) == state


@few
def test_the_negative_prompt_is_left_alone(
    confining: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    model, x = tiny_model(family.model), family.latent(2)
    confined = confining.confined(model, "ann", left(family))
    both = stock.velocity(confined, prompt(family), family.prompt(2), 3.0, x, 0.6)
    positive, negative = velocity(confined, prompt(family), x), velocity(model, family.prompt(2), x)
    torch.testing.assert_close(both, negative + 3 * (positive - negative), rtol=1e-3, atol=1e-3)
    in_negative = stock.velocity(confined, family.prompt(2), prompt(family), 3.0, x, 0.6)
    torch.testing.assert_close(
        in_negative, positive + 3 * (negative - positive), rtol=1e-3, atol=1e-3
    )


@few
def test_a_batch_is_its_pictures(
    confining: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    model, x = tiny_model(family.model), family.latent(2)
    masks = torch.cat([left(family), 1 - left(family)])
    together = velocity(confining.confined(model, "ann", masks), prompt(family), x)
    for i in range(2):
        alone = velocity(
            confining.confined(model, "ann", masks[i : i + 1]), prompt(family), x[i : i + 1]
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="mask has 3 images, the latent 2: use one mask, or one"):
        velocity(confining.confined(model, "ann", torch.ones(3, 8, 8)), prompt(family), x)


@few
def test_two_words_each_in_its_own_region(
    confining: ModuleType, tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    witness, mask = Witness(), left(family)
    model = tap.tapped(tiny_model(family.model), tap.observing(witness))
    both = confining.confined(confining.confined(model, "ann", mask), "bea", 1 - mask)
    velocity(both, prompt(family), family.latent())
    for attention in (a for a in witness.attentions if a.place.text is not None):
        found, image = weights(attention)[:, :, attention.place.image], inside(attention, mask)
        for rows, region in ((ANN, image), (BEA, 1 - image)):
            columns = [family.words[row] for row in rows]
            assert (found[:, :, region == 0][..., columns] == 0).all()
            assert (found[:, :, region > 0][..., columns] > 0).all()


@each_of("SD1.5", "SDXL")
def test_prompts_of_other_lengths_in_the_same_call(
    confining: ModuleType, tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    """ComfyUI repeats both prompts of a UNet to a common length, here 12 and 8 to 24."""
    witness, mask = Witness(), left(family)
    model = tap.tapped(tiny_model(family.model), tap.observing(witness))
    confined = confining.confined(model, "ann", mask)
    stock.velocity(confined, prompt(family), family.prompt(2, tokens=8), 3.0, family.latent(), 0.6)
    crossing = [a for a in witness.attentions if a.place.text is not None]
    columns = [row + start for start in (0, WORDS) for row in ANN]
    for attention in crossing:
        assert attention.k.shape[2] == 2 * WORDS
        (rows,) = attention.call.rows_of(lambda _uuid, index: index == 0)
        none = (weights(attention) == 0).any(1)
        outside = (inside(attention, mask) == 0).nonzero().flatten().tolist()
        for row in range(2):
            expected = torch.zeros_like(none[row])
            if rows.start == row:
                expected[[[q] for q in outside], columns] = True
            assert torch.equal(none[row], expected)


@few
def test_areas_see_their_part_of_the_mask(
    confining: ModuleType, tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    """The prompt is for the right half, the mask for the right quarter."""
    mask = torch.zeros(1, 16, 16)
    mask[..., 12:] = 1
    witness = Witness()
    model = tap.tapped(tiny_model(family.model), tap.observing(witness))
    confined = confining.confined(model, "ann", mask)
    area = stock.with_values(prompt(family), area=(16, 8, 0, 8), strength=1.0)
    whole = family.prompt(2)
    x = torch.randn(1, family.channels, 16, 16, generator=torch.Generator().manual_seed(3))
    stock.velocity(confined, area + whole, family.prompt(4), 3.0, x, 0.6)
    columns = [family.words[row] for row in ANN]
    confined_rows = 0
    for attention in (a for a in witness.attentions if a.place.text is not None):
        image = weights(attention)[:, :, attention.place.image][..., columns].amax((1, 3))
        _, height, width = attention.place.grid
        for row in image.view(-1, height, width):
            if (row == 0).any():
                assert attention.call.latent[-2:] == (16, 8)
                assert (row[:, : width // 2] == 0).all()
                assert (row[:, width // 2 :] > 0).all()
                confined_rows += 1
    # Once in every attention: ComfyUI makes a copy of the negative prompt for the same area.
    assert confined_rows == sum(
        a.place.text is not None and a.call.latent[-1] == 8 for a in witness.attentions
    )


@few
def test_rows_that_are_known_are_confined_without_a_guider(
    confining: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    model, x, mask = tiny_model(family.model), family.latent(2), left(family)
    place = confining.Confinement(tuple(ANN), WORDS, mask)
    known = velocity(confining.confined_rows(model, place), family.prompt(1), x)
    assert torch.equal(known, velocity(confining.confined(model, "ann", mask), prompt(family), x))
    assert not torch.equal(known, velocity(model, family.prompt(1), x))


@each_of("SD3", "Flux")
def test_source_and_target_still_share_a_call(
    pack: ModuleType, confining: ModuleType, tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    witness, mask = Witness(), left(family)
    model = tap.tapped(tiny_model(family.model), tap.observing(witness))
    confined = confining.confined(model, "ann", mask)
    guider = pack.nodes.host.guiding.SourceTargetGuider(confined, prompt(family), family.prompt(2))
    x = family.latent()
    stock.inside(guider, x, lambda g, extra: g.velocities(x, x + 0.1, 0.6, extra))
    columns = [family.words[row] for row in ANN]
    for attention in witness.attentions:
        assert len(attention.call.branches) == 2
        (source,) = attention.call.rows_of(
            lambda uuid, _i, call=attention.call: uuid in call.sources
        )
        outside = inside(attention, mask) == 0
        found = weights(attention)[:, :, attention.place.image][:, :, outside][..., columns]
        assert (found[source] == 0).all()
        assert (found[1 - source.start] > 0).all()


def test_prompts_joined_by_stock_nodes(
    pack: ModuleType, confining: ModuleType, tap: ModuleType, tiny_model: TinyModel
) -> None:
    """Conditioning (Concat) keeps the first prompt's notes, and so the rows that it had."""
    witness, mask = Witness(), torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    vector = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    clip = pack.nodes.host.words.with_words(tiny_clip.clip(), {"ann": {"l": vector}})
    first, second = (
        stock.call("CLIPTextEncode", clip=clip, text=text)[0]
        for text in ("a photo of <ann>", "on a beach")
    )
    joined = stock.call("ConditioningConcat", conditioning_to=first, conditioning_from=second)[0]
    model = tap.tapped(tiny_model("sd3_bare"), tap.observing(witness))
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    velocity(confining.confined(model, "ann", mask), joined, x)
    for attention in witness.attentions:
        assert attention.place.text == slice(0, 154)
        none = (weights(attention)[0, :, attention.place.image] == 0).all(0)
        assert none.any(0).nonzero().flatten().tolist() == [4]
