"""Heat maps over pictures: sizes, ranges, and that hot places look hot."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def pictures(pack: ModuleType) -> ModuleType:
    return pack.kernels.pictures


def test_heat_colours_pass_through_their_stops(pictures: ModuleType) -> None:
    stops = torch.tensor(pictures._heat_colors)
    heat = torch.linspace(0, 1, len(stops)).view(1, 1, -1)
    assert torch.allclose(pictures.heat_colors(heat)[0, 0], stops, rtol=0, atol=1e-6)
    between = pictures.heat_colors(torch.tensor([[[0.5 / (len(stops) - 1)]]]))[0, 0, 0]
    assert torch.allclose(between, (stops[0] + stops[1]) / 2, rtol=0, atol=1e-6)


def test_heat_outside_its_range_is_clipped(pictures: ModuleType) -> None:
    wild, tame = torch.tensor([[[-3.0, 7.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert torch.equal(pictures.heat_colors(wild), pictures.heat_colors(tame))


def test_hotter_is_brighter(pictures: ModuleType) -> None:
    luminance = torch.tensor([0.2126, 0.7152, 0.0722])
    colors = pictures.heat_colors(torch.linspace(0, 1, 101).view(1, 1, -1))[0, 0]
    assert ((colors @ luminance).diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(1, 5, 7), (3, 16, 16), (1, 1, 1)], ids=str)
def test_overlay_has_the_pictures_size_and_range(
    pictures: ModuleType, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    heat = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    image = torch.rand(1, 33, 47, 3).to(dtype)
    result = pictures.heat_over(image, heat)
    assert result.shape == (size[0], 33, 47, 3)
    assert result.min() >= 0
    assert result.max() <= 1


def test_overlay_shows_hot_places_most_and_the_picture_everywhere(pictures: ModuleType) -> None:
    heat = torch.zeros(1, 4, 4)
    heat[:, :, 2:] = 1
    image = torch.full((1, 32, 32, 3), 0.5)
    cold, hot = pictures._heat_colors[0], pictures._heat_colors[-1]
    result = pictures.heat_over(image, heat, opacity=0.6)
    # Far from the seam, where the smooth enlargement has settled.
    assert torch.allclose(result[0, 16, 0], 0.5 * 0.8 + 0.2 * torch.tensor(cold), atol=1e-3)
    assert torch.allclose(result[0, 16, -1], 0.5 * 0.4 + 0.6 * torch.tensor(hot), atol=1e-3)
    assert torch.equal(pictures.heat_over(image, heat, opacity=0.0), image)
