"""Crops and squares against naive loops, and the promises of their docstrings."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

COLOR = (0.25, 0.5, 0.75)
SHAPES = {"square": (6, 6), "wide": (4, 9), "tall": (9, 4), "row": (1, 5), "pixel": (1, 1)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def crops(pack: ModuleType) -> ModuleType:
    return pack.kernels.crops


def uniform(*size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


# Colours


def test_grey_becomes_three_equal_channels(crops: ModuleType) -> None:
    grey = uniform(3, 4, 1)
    assert torch.equal(crops.on_color(grey, COLOR), torch.cat([grey] * 3, -1))


def test_colours_stay(crops: ModuleType) -> None:
    picture = uniform(3, 4, 3)
    assert torch.equal(crops.on_color(picture, COLOR), picture)


def test_transparent_places_show_the_colour(crops: ModuleType) -> None:
    picture = uniform(2, 3, 4)
    picture[0, :, 3], picture[1, :, 3] = 0, 1
    shown = crops.on_color(picture, COLOR)
    assert torch.equal(shown[0], torch.tensor(COLOR).expand(3, 3))
    assert torch.equal(shown[1], picture[1, :, :3])


def test_half_opacity_is_the_mean(crops: ModuleType) -> None:
    picture = uniform(3, 4, 3)
    shown = crops.over_color(picture, torch.full((3, 4), 0.5), COLOR)
    assert torch.allclose(shown, (picture + torch.tensor(COLOR)) / 2)


# Boxes


@shapes
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_box_holds_the_mask_and_its_margin(
    crops: ModuleType, shape: tuple[int, int], margin: float
) -> None:
    mask = (uniform(*shape) > 0.8).float()
    mask[shape[0] // 2, shape[1] // 2] = 1
    inside = [(y, x) for y in range(shape[0]) for x in range(shape[1]) if mask[y, x]]
    spans = [(min(places), max(places)) for places in zip(*inside, strict=True)]
    wider = round(margin * max(last - first + 1 for first, last in spans))
    expected = tuple(
        slice(max(0, first - wider), min(size, last + 1 + wider))
        for (first, last), size in zip(spans, shape, strict=True)
    )
    assert crops.box_around(mask, margin) == expected


def test_box_starts_at_the_threshold(crops: ModuleType) -> None:
    mask = torch.zeros(5, 5)
    mask[1:4, 1:4], mask[2, 2] = 0.49, 0.5
    assert crops.box_around(mask, 0.0) == (slice(2, 3), slice(2, 3))


def test_no_box_without_an_inside(crops: ModuleType) -> None:
    assert crops.box_around(torch.full((4, 4), 0.4), 0.5) is None


# Squares


@shapes
def test_padded_square_holds_all_of_the_picture(crops: ModuleType, shape: tuple[int, int]) -> None:
    picture, side = uniform(*shape, 3), max(shape)
    expected = torch.tensor(COLOR).repeat(side, side, 1)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    for y in range(shape[0]):
        for x in range(shape[1]):
            expected[top + y, left + x] = picture[y, x]
    assert torch.equal(crops.padded_square(picture, COLOR), expected)


@shapes
def test_centre_square_is_the_middle(crops: ModuleType, shape: tuple[int, int]) -> None:
    picture, side = uniform(*shape, 3), min(shape)
    found = crops.centre_square(picture)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    assert found.shape == (side, side, 3)
    assert all(
        torch.equal(found[y, x], picture[top + y, left + x])
        for y in range(side)
        for x in range(side)
    )


def test_centre_square_is_that_of_comfyui(crops: ModuleType) -> None:
    from comfy.clip_model import clip_preprocess

    picture, plain = (uniform(8, 13, 3) * 255).round() / 255, ([0.0] * 3, [1.0] * 3)
    expected = clip_preprocess(picture[None], 8, *plain)
    found = clip_preprocess(crops.centre_square(picture)[None], 8, *plain)
    assert torch.allclose(found, expected, atol=1e-6)
