"""Where text and picture lie: the table of layouts against every family at true architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from host import stock
from host.tapping import FAMILIES, Family, Witness, each_of, families

TinyModel = Callable[[str], Any]

with_references = each_of(*(name for name in FAMILIES if "reference" in name))


@pytest.fixture
def layouts(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.layouts


@pytest.fixture
def look(pack: ModuleType, tiny_model: TinyModel) -> Callable[..., Witness]:
    """A function that runs a family's model once, for one prompt, and says what it saw."""

    def run(family: Family, text: int = 1, extras: int = 0, picture: int = 31) -> Witness:
        witness = Witness()
        tap = pack.nodes.host.tap
        model = tap.tapped(tiny_model(family.model), tap.observing(witness))
        latent = family.latent(seed=picture)
        stock.velocity(model, family.prompt(text, extras), None, 1.0, latent, 0.6)
        return witness

    return run


@families
def test_every_attention_is_seen_once_and_in_order(
    pack: ModuleType, layouts: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    witness, tap = Witness(), pack.nodes.host.tap
    family.velocity(tap.tapped(tiny_model(family.model), tap.observing(witness)))
    assert witness.names == list(family.seen)
    blocks = layouts.blocks_of(tiny_model(family.model))
    assert list(dict.fromkeys(a.place.block for a in witness.attentions)) == blocks


@families
def test_places_are_where_they_were_written_down(
    look: Callable[..., Witness], family: Family
) -> None:
    for attention in look(family).attentions:
        place, block = attention.place, str(attention.place.block)
        assert place.grid == family.grid_of(block)
        assert span(place.image) == family.image_of(block, place.kind)
        assert (place.text is None) == (place.kind == "self")
        assert place.text is None or span(place.text) == family.text
        assert attention.q.shape[2] >= place.image.stop
        assert place.text is None or attention.k.shape[2] >= place.text.stop


def span(part: slice) -> range:
    return range(part.start, part.stop)


def changed(before: Witness, after: Witness, position: int, name: str) -> set[int]:
    """The tokens of an attention's q, k or v that two runs do not share."""
    first, second = (getattr(w.attentions[position], name) for w in (before, after))
    return set((first != second).any(dim=3).any(dim=1).any(dim=0).nonzero().flatten().tolist())


def first_block(witness: Witness) -> list[tuple[int, str, range]]:
    """Position, kind and picture's tokens of what the first block does."""
    first = witness.attentions[0].place.block
    return [
        (i, attention.place.kind, span(attention.place.image))
        for i, attention in enumerate(witness.attentions)
        if attention.place.block == first
    ]


@families
def test_another_prompt_changes_the_text_and_nothing_else(
    look: Callable[..., Witness], family: Family
) -> None:
    before, after = look(family), look(family, text=2)
    for position, kind, _ in first_block(before):
        for name in "qkv":
            tokens = changed(before, after, position, name)
            if kind == "joint" or (kind == "cross" and name != "q"):
                assert set(family.words) <= tokens <= set(family.text)
            else:
                assert tokens == set()


@families
def test_another_picture_changes_the_picture_and_nothing_else(
    look: Callable[..., Witness], family: Family
) -> None:
    before, after = look(family), look(family, picture=32)
    for position, kind, image in first_block(before):
        padded = range(image.start, image.stop + family.padding)
        for name in "qkv":
            tokens = changed(before, after, position, name)
            if kind != "cross":
                assert set(image) <= tokens <= set(padded)
            elif name == "q":
                # The self-attention before it has carried the picture everywhere.
                assert set(image) <= tokens
            else:
                assert tokens == set()


@with_references
def test_another_reference_changes_neither_text_nor_picture(
    look: Callable[..., Witness], family: Family
) -> None:
    before, after = look(family), look(family, extras=1)
    for position, kind, image in first_block(before):
        ours = set(image) | set(family.text if kind == "joint" else ())
        for name in "qkv":
            tokens = changed(before, after, position, name)
            if kind != "cross":
                assert tokens
                assert not tokens & ours
            elif name != "q":
                assert tokens == set()


@families
def test_padding_is_on_the_side_that_the_table_says(
    layouts: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    side = layouts.layout_of(tiny_model(family.model)).text_padding
    padding = set(family.text) - set(family.words)
    assert side in ("left", "right")
    assert all((token < family.words.start) == (side == "left") for token in padding)


@families
def test_sizes_of_values_are_known_beforehand(
    layouts: ModuleType, tiny_model: TinyModel, look: Callable[..., Witness], family: Family
) -> None:
    seen = look(family).attentions
    given = tuple(family.latent().shape), seen[0].call.text_length
    sizes = layouts.value_sizes(tiny_model(family.model), *given)
    assert list(sizes) == layouts.blocks_of(tiny_model(family.model))
    for attention in seen:
        size, place = sizes[attention.place.block], attention.place
        if place.kind == "cross":
            continue
        assert size.tokens == place.image.stop - place.image.start == math.prod(place.grid)
        assert size.width == attention.v.shape[1] * attention.v.shape[3]
        assert place.kind == "self" or size.text == len(family.text)


# Blocks by name


@pytest.fixture
def flux_dev(layouts: ModuleType) -> Any:
    """As much of Flux.1-dev as its blocks are counted by."""
    import comfy.supported_models

    network = layouts.Flux.__new__(layouts.Flux)
    nn.Module.__init__(network)
    network.double_blocks, network.single_blocks = nn.ModuleList(), nn.ModuleList()
    network.double_blocks.extend(nn.Identity() for _ in range(19))
    network.single_blocks.extend(nn.Identity() for _ in range(38))
    return stub(network, comfy.supported_models.Flux({}))


def stub(network: nn.Module, config: Any) -> Any:
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=network, model_config=config))


def doubles(first: int, last: int) -> set[str]:
    return {f"double {i}" for i in range(first, last + 1)}


def singles(first: int, last: int) -> set[str]:
    return {f"single {i}" for i in range(first, last + 1)}


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ("all", doubles(0, 18) | singles(0, 37)),
        ("single", singles(0, 37)),
        ("Single 20-37", singles(20, 37)),
        ("double 3", doubles(3, 3)),
        ("double", doubles(0, 18)),
        ("0-18", doubles(0, 18) | singles(0, 18)),
        ("5", doubles(5, 5) | singles(5, 5)),
        ("67%-100%", singles(20, 37)),
        ("0%-33%", doubles(0, 18)),
        ("0%-100%", doubles(0, 18) | singles(0, 37)),
        ("single 50%-100%", singles(19, 37)),
        (" double 0-1 ,, single 36-99 ", doubles(0, 1) | singles(36, 37)),
    ],
)
def test_blocks_are_chosen_by_kind_range_and_depth(
    layouts: ModuleType, flux_dev: Any, choice: str, chosen: set[str]
) -> None:
    assert {str(block) for block in layouts.chosen_blocks(flux_dev, choice)} == chosen


@pytest.mark.parametrize("cut", ["50%", "33%", "7.5%", "100%"])
@pytest.mark.parametrize("kind", ["", "double ", "single "])
def test_ranges_that_meet_share_no_block_and_leave_none_out(
    layouts: ModuleType, flux_dev: Any, cut: str, kind: str
) -> None:
    parts = [f"{kind}0%-{cut}"] + ([] if cut == "100%" else [f"{kind}{cut}-100%"])
    chosen = [block for part in parts for block in layouts.chosen_blocks(flux_dev, part)]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) == layouts.chosen_blocks(flux_dev, kind or "all")


def test_two_thirds_of_few_blocks_are_whole_blocks(layouts: ModuleType, flux_dev: Any) -> None:
    flux_dev.model.diffusion_model.double_blocks = nn.ModuleList()
    for count, first in {3: 2, 6: 4, 24: 16, 38: 26}.items():
        singles = nn.ModuleList(nn.Identity() for _ in range(count))
        flux_dev.model.diffusion_model.single_blocks = singles
        chosen = sorted(block.index for block in layouts.chosen_blocks(flux_dev, "67%-100%"))
        assert chosen == list(range(first, count))


@pytest.mark.parametrize(
    "part",
    [
        "joint",
        "single 38",
        "19 double",
        "single 3-x",
        "50%",
        "80%-70%",
        "5-4",
        "-3",
        "double single",
    ],
)
def test_blocks_that_a_model_has_not_are_refused_with_those_it_has(
    layouts: ModuleType, flux_dev: Any, part: str
) -> None:
    message = f"blocks has '{part}', which Flux has not: its blocks are double 0-18, single 0-37; "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layouts.chosen_blocks(flux_dev, f"double, {part}")


def test_blocks_of_a_unet_are_named_with_their_gaps(
    layouts: ModuleType, tiny_model: TinyModel
) -> None:
    known = "input 3, input 5, middle 0, output 0-3"
    with pytest.raises(ValueError, match=f"^blocks has 'input 4', which SDXL has not: .* {known};"):
        layouts.chosen_blocks(tiny_model("sdxl"), "input 4")
    chosen = {str(block) for block in layouts.chosen_blocks(tiny_model("sdxl"), "input 5, middle")}
    assert chosen == {"input 5", "input 5.1", "middle 0", "middle 0.1"}


@pytest.mark.parametrize("choice", ["", " , "])
def test_no_blocks_are_refused(layouts: ModuleType, flux_dev: Any, choice: str) -> None:
    with pytest.raises(ValueError, match=r"^blocks is empty: write for example"):
        layouts.chosen_blocks(flux_dev, choice)


def test_families_that_are_not_in_the_table_are_refused(pack: ModuleType) -> None:
    import comfy.supported_models

    model = stub(nn.Identity(), comfy.supported_models.PixArtAlpha({}))
    host, sentence = pack.nodes.host, r"^model is PixArtAlpha, whose attention .*: load SD1\.5, "
    for ask in (
        host.layouts.layout_of,
        host.layouts.blocks_of,
        lambda model: host.layouts.chosen_blocks(model, "all"),
        lambda model: host.tap.tapped(model, host.tap.observing(lambda _: None)),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask(model)
