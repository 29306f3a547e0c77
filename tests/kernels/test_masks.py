"""Mask arithmetic against naive loops and float64, and the promises of its docstrings."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Of batch, height and width.
SIZES = {"square": (1, 8, 8), "odd batch": (3, 7, 11), "one row": (2, 1, 9), "one cell": (1, 1, 1)}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
windows = pytest.mark.parametrize("window", [2, 3, 4, 5, 9, 63])


@pytest.fixture(scope="module")
def masks(pack: ModuleType) -> ModuleType:
    return pack.kernels.masks


def uniform(size: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def over_windows(mask: Tensor, window: int, reduce: str) -> Tensor:
    """Mean or maximum over the cells that exist around each cell, one cell at a time."""
    reach, result = (window | 1) // 2, torch.empty_like(mask)
    for y in range(mask.shape[1]):
        for x in range(mask.shape[2]):
            rows = slice(max(0, y - reach), y + reach + 1)
            columns = slice(max(0, x - reach), x + reach + 1)
            around = mask[:, rows, columns].flatten(1)
            result[:, y, x] = around.mean(1) if reduce == "mean" else around.amax(1)
    return result


@sizes
@windows
def test_blur_is_the_mean_over_cells_that_exist(
    masks: ModuleType, size: tuple[int, ...], window: int
) -> None:
    mask = uniform(size)
    expected = over_windows(mask.double(), window, "mean")
    # Sums of up to 3969 numbers in float32.
    assert torch.allclose(masks.blurred(mask, window).double(), expected, rtol=0, atol=1e-6)


@sizes
@windows
def test_dilation_is_the_maximum_over_the_window(
    masks: ModuleType, size: tuple[int, ...], window: int
) -> None:
    mask = uniform(size)
    assert torch.equal(masks.dilated(mask, window), over_windows(mask, window, "max"))


@pytest.mark.parametrize("window", [0, 1])
def test_windows_of_one_cell_change_nothing(masks: ModuleType, window: int) -> None:
    mask = uniform((2, 5, 7))
    assert torch.equal(masks.dilated(mask, window), mask)
    assert torch.equal(masks.blurred(mask, window), mask)


@windows
def test_blur_keeps_full_and_empty_masks(masks: ModuleType, window: int) -> None:
    for value in (0.0, 1.0):
        mask = torch.full((1, 9, 6), value)
        assert torch.equal(masks.blurred(mask, window), mask)


@dtypes
def test_masks_keep_their_dtype_and_range(masks: ModuleType, dtype: torch.dtype) -> None:
    mask = uniform((2, 9, 6), dtype=dtype)
    results = {
        "dilated": masks.dilated(mask, 3),
        "blurred": masks.blurred(mask, 3),
        "contrasted": masks.contrasted(mask, 0.3, 0.3),
        "thresholded": masks.contrasted(mask, 0.3, 0.0),
        "grown": masks.resized(mask, 20, 13),
        "shrunk": masks.resized(mask, 4, 5),
        "softened": masks.softened(mask, 1.3),
        "without specks": masks.without_specks(mask, 0.3, 3),
    }
    for name, result in results.items():
        assert result.dtype == dtype, name
        assert result.min() >= 0, name
        assert result.max() <= 1, name


@dtypes
@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (2, 16, 3, 5, 7), (1, 4, 1, 1, 1)], ids=str)
def test_velocity_difference_is_the_mean_over_channels_and_frames(
    masks: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    target, source = uniform(shape, 1, dtype), uniform(shape, 2, dtype)
    expected = (target.double() - source.double()).abs().mean(1)
    if len(shape) == 5:
        expected = expected.mean(1)
    result = masks.velocity_difference(target, source)
    assert result.shape == (shape[0], *shape[-2:])
    # Differences below 1, rounded to the dtype before and after the mean.
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype]
    assert (result.double() - expected).abs().max() <= tolerance


@sizes
@pytest.mark.parametrize(("low", "high"), [(0.01, 0.99), (0.0, 1.0), (0.25, 0.6)], ids=str)
def test_normalising_clips_to_quantiles_and_stretches(
    masks: ModuleType, size: tuple[int, ...], low: float, high: float
) -> None:
    heat = uniform(size) * 7 + 2
    result = masks.normalized(heat, low, high)
    for row, picture in zip(result, heat.double(), strict=True):
        bottom, top = picture.quantile(low), picture.quantile(high)
        expected = (picture.clamp(bottom, top) - bottom) / (top - bottom + 1e-8)
        # Subtracting numbers around 5 and stretching by up to 1 / 0.1.
        assert torch.allclose(row.double(), expected, rtol=0, atol=2e-5)


def test_each_picture_is_normalised_by_itself(masks: ModuleType) -> None:
    heat = uniform((3, 6, 5)) * torch.tensor([1.0, 10.0, 0.01]).view(3, 1, 1)
    together = masks.normalized(heat)
    apart = torch.cat([masks.normalized(row) for row in heat.split(1)])
    assert torch.equal(together, apart)
    assert (together.amax((1, 2)) > 0.999).all()
    assert (together.amin((1, 2)) == 0).all()


def test_normalising_a_flat_map_gives_zeros(masks: ModuleType) -> None:
    assert not masks.normalized(torch.full((2, 4, 4), 3.0)).any()


@dtypes
def test_contrast_at_one_half_over_one_changes_nothing(
    masks: ModuleType, dtype: torch.dtype
) -> None:
    # Multiples of 1/256, so that shifting by a half and back rounds nothing away.
    mask = ((uniform((2, 9, 9)) * 256).round() / 256).to(dtype)
    assert torch.equal(masks.contrasted(mask, 0.5, 1.0), mask)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.0])
def test_contrast_rises_around_the_threshold(masks: ModuleType, threshold: float) -> None:
    mask = torch.linspace(0, 1, 1001, dtype=torch.float64).view(1, 1, -1)
    soft = masks.contrasted(mask, threshold, 0.2)
    ramp = (mask - (threshold - 0.1)) / 0.2
    assert torch.allclose(soft, ramp.clamp(0, 1), rtol=0, atol=1e-12)
    assert torch.equal(masks.contrasted(mask, threshold, 0.0), (mask >= threshold).double())


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3])
def test_contrast_keeps_places_without_heat_outside(masks: ModuleType, threshold: float) -> None:
    heat = torch.tensor([[[0.0, threshold, 2 * threshold]]], dtype=torch.float64)
    soft = masks.contrasted(heat, threshold, 1.0)
    assert torch.allclose(soft, torch.tensor([[[0.0, 0.5, 1.0]]], dtype=torch.float64))
    assert soft[0, 0, 0] == 0


@pytest.mark.parametrize("factor", [2, 3, 5, 8, 16])
@sizes
def test_growing_by_a_whole_factor_and_shrinking_again_is_exact(
    masks: ModuleType, size: tuple[int, ...], factor: int
) -> None:
    mask = uniform(size)
    grown = masks.resized(mask, size[1] * factor, size[2] * factor)
    assert torch.equal(grown, mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    assert torch.equal(masks.resized(grown, *size[1:]), mask)


def test_shrinking_is_the_mean_over_areas(masks: ModuleType) -> None:
    mask = uniform((2, 12, 10))
    expected = mask.double().unflatten(1, (4, 3)).unflatten(3, (5, 2)).mean((2, 4))
    assert torch.allclose(masks.resized(mask, 4, 5).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [((7, 5), (3, 11)), ((4, 9), (9, 4)), ((5, 5), (1, 1)), ((1, 1), (6, 7)), ((13, 8), (8, 13))],
    ids=str,
)
def test_resizing_keeps_full_and_empty_masks(
    masks: ModuleType, before: tuple[int, int], after: tuple[int, int]
) -> None:
    for value in (0.0, 1.0):
        result = masks.resized(torch.full((2, *before), value), *after)
        assert torch.equal(result, torch.full((2, *after), value))


def test_masks_need_not_be_contiguous(masks: ModuleType) -> None:
    mask = uniform((2, 7, 5))
    turned = mask.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    functions = {
        "dilated": lambda m: masks.dilated(m, 3),
        "blurred": lambda m: masks.blurred(m, 3),
        "normalized": masks.normalized,
        "resized": lambda m: masks.resized(m, 14, 3),
        "feathered": lambda m: masks.feathered_inward(m, 0.5, 3),
        "softened": lambda m: masks.softened(m, 0.8),
        "without specks": lambda m: masks.without_specks(m, 0.5, 3),
    }
    for name, function in functions.items():
        # Another memory layout may add in another order.
        assert torch.allclose(function(turned), function(mask), rtol=0, atol=1e-6), name


@pytest.fixture
def blobs() -> Tensor:
    """Random hard masks with holes, islands and regions that touch the border."""
    rough = uniform((4, 1, 5, 7), seed=3)
    grown = torch.nn.functional.interpolate(rough, (37, 51), mode="bilinear")
    return (grown[:, 0] > 0.45).float()


def chessboard_distance(inside: Tensor) -> Tensor:
    """From each cell to the nearest outside cell, infinite where there is none."""
    result = torch.full(inside.shape, torch.inf)
    for picture, distances in zip(inside, result, strict=True):
        for y, x in (picture == 0).nonzero():
            rows = (torch.arange(picture.shape[0]) - y).abs()[:, None]
            columns = (torch.arange(picture.shape[1]) - x).abs()[None]
            torch.minimum(distances, torch.maximum(rows, columns), out=distances)
    return result


@pytest.mark.parametrize("feather", [0, 1, 2, 5, 64])
def test_feather_is_the_distance_to_the_outside(
    masks: ModuleType, blobs: Tensor, feather: int
) -> None:
    distance = chessboard_distance(blobs)
    expected = ((distance - 0.5) / feather).clamp(0, 1) if feather else blobs
    # The last half step of the ramp is a full one: depth stops counting at `feather`.
    expected[distance > feather] = 1
    result = masks.feathered_inward(blobs, 0.5, feather)
    assert torch.allclose(result, expected, rtol=0, atol=1e-6)
    assert not result[blobs == 0].any()
    assert (result[blobs == 1] > 0).all()
    assert (result[distance > feather] == 1).all()


def test_wider_feathers_cover_less(masks: ModuleType, blobs: Tensor) -> None:
    previous = masks.feathered_inward(blobs, 0.5, 0)
    for feather in (1, 2, 3, 8):
        current = masks.feathered_inward(blobs, 0.5, feather)
        assert (current <= previous + 1e-6).all()
        previous = current


@pytest.mark.parametrize("feather", [0, 1, 7, 100])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_full_and_empty_masks_have_no_feather(
    masks: ModuleType, value: float, feather: int
) -> None:
    mask = torch.full((1, 9, 13), value)
    assert torch.equal(masks.feathered_inward(mask, 0.5, feather), mask)


def test_feather_starts_where_a_soft_mask_reaches_the_threshold(masks: ModuleType) -> None:
    mask = torch.linspace(0, 1, 11).view(1, 1, -1).expand(1, 3, -1)
    for threshold in (0.25, 0.5, 1.0):
        covered = masks.feathered_inward(mask, threshold, 2) > 0
        assert torch.equal(covered, mask >= threshold)


# Soft edges


@sizes
@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.0, 2.7, 16.0])
def test_softening_is_a_gaussian_over_repeated_borders(
    masks: ModuleType, size: tuple[int, ...], deviation: float
) -> None:
    from scipy.ndimage import gaussian_filter

    mask = uniform(size)
    for row, picture in zip(masks.softened(mask, deviation), mask.double().numpy(), strict=True):
        reach = math.ceil(3 * deviation)
        expected = gaussian_filter(picture, deviation, mode="nearest", radius=reach)
        # Sums of up to 97 numbers in float32, twice.
        assert torch.allclose(row.double(), torch.from_numpy(expected), rtol=0, atol=2e-6)


def test_softening_keeps_mass_and_symmetry_and_what_is_far_from_an_edge(masks: ModuleType) -> None:
    mask = torch.zeros(1, 41, 43)
    mask[:, 15:26, 15:28] = 1
    soft = masks.softened(mask, 2.0)
    assert soft.sum().item() == pytest.approx(11 * 13, rel=1e-5)
    for turned in (soft.flip(1), soft.flip(2)):
        assert torch.allclose(soft, turned, rtol=0, atol=1e-6)
    away = masks.dilated(mask, 13) == 0
    assert not soft[away].any()
    assert (soft[masks.dilated(mask, 3) == 1] > 0).all()
    # Half of the way up, where the edge was.
    assert (soft[0, 20, 14] + soft[0, 20, 15]).item() == pytest.approx(1, abs=0.01)
    for value in (0.0, 1.0):
        flat = torch.full((2, 9, 6), value)
        assert torch.allclose(masks.softened(flat, 3.0), flat, rtol=0, atol=1e-6)


@pytest.mark.parametrize("deviation", [0.0, -1.0])
def test_no_deviation_softens_nothing(masks: ModuleType, deviation: float) -> None:
    mask = uniform((2, 5, 7))
    assert torch.equal(masks.softened(mask, deviation), mask)


# Specks


def labelled(heat: Tensor, threshold: float, smallest: int) -> Tensor:
    """Without small patches by SciPy's labels; patches may hold together at a corner."""
    from scipy.ndimage import label

    result = heat.clone()
    for picture in result:
        labels, count = label((picture >= threshold).numpy(), torch.ones(3, 3).numpy())
        patches = torch.from_numpy(labels)
        for number in range(1, count + 1):
            if (patches == number).sum() < smallest:
                picture[patches == number] = 0
    return result


@pytest.mark.parametrize("threshold", [0.9, 0.75, 0.6, 0.3, 0.0])
@pytest.mark.parametrize("smallest", [2, 3, 5, 20, 10**6])
def test_specks_are_the_small_patches(masks: ModuleType, threshold: float, smallest: int) -> None:
    heat = uniform((3, 33, 47))
    expected = labelled(heat, threshold, smallest)
    assert torch.equal(masks.without_specks(heat, threshold, smallest), expected)
    if smallest == 5 and threshold in (0.9, 0.75):
        assert not torch.equal(expected, heat)
        assert (expected >= threshold).any()


def test_a_long_winding_patch_is_one(masks: ModuleType) -> None:
    heat = torch.zeros(1, 31, 31)
    heat[:, ::4] = 1
    heat[:, 2::8, -1] = heat[:, 1::8, -1] = heat[:, 3::8, -1] = 1
    heat[:, 5::8, 0] = heat[:, 6::8, 0] = heat[:, 7::8, 0] = 1
    cells = int(heat.sum())
    assert torch.equal(labelled(heat, 0.5, cells), heat)
    assert torch.equal(masks.without_specks(heat, 0.5, cells), heat)
    assert not masks.without_specks(heat, 0.5, cells + 1).any()


def test_pictures_of_a_batch_have_patches_of_their_own(masks: ModuleType) -> None:
    heat = torch.zeros(2, 4, 4)
    heat[0, 0, 0] = heat[1, 0, :2] = 1
    found = masks.without_specks(heat, 0.5, 2)
    assert not found[0].any()
    assert torch.equal(found[1], heat[1])


@pytest.mark.parametrize("smallest", [0, 1])
def test_no_smallest_part_removes_nothing(masks: ModuleType, smallest: int) -> None:
    heat = uniform((2, 5, 7))
    assert torch.equal(masks.without_specks(heat, 0.5, smallest), heat)
