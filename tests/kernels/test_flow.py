"""Flow steps against the same formulas in float64, over the shapes and dtypes models use."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

SHAPES = {
    "single": (1, 16, 8, 8),
    "odd batch": (3, 16, 7, 5),
    "one cell": (1, 4, 1, 1),
    "video": (2, 16, 3, 5, 4),
}
# Rounding of a handful of operations on numbers of a few units.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 2e-6}

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(scope="module")
def flow(pack: ModuleType) -> ModuleType:
    return pack.kernels.flow


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_for(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A soft mask with exact zeros and ones, of one channel."""
    values = randn((shape[0], 1, *shape[2:]), 9).clamp(-0.5, 0.5) + 0.5
    return values.to(dtype)


@shapes
@dtypes
def test_steps_equal_their_formulas(
    flow: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    a, b, c, m = (randn(shape, seed, dtype) for seed in (1, 2, 3, 4))
    mask, sigma, step = mask_for(shape, dtype), 0.7, -0.15
    da, db, dc, dm, dmask = (t.double() for t in (a, b, c, m, mask))
    expected = {
        "noised": 0.3 * da + 0.7 * db,
        "velocity": (da - db) / 0.7,
        "masked delta": da + step * dmask * db,
        "blended": da + step * (dmask * db + (1 - dmask) * dc),
        "anchored": dmask * da + (1 - dmask) * (0.3 * db + 0.7 * dm),
        "fused": da + 0.8 * (1 - dmask) * (db - da),
    }
    results = {
        "noised": flow.noised(a, b, sigma),
        "velocity": flow.velocity(a, b, sigma),
        "masked delta": flow.masked_delta_step(a, b, mask, step),
        "blended": flow.blended_step(a, b, c, mask, step),
        "anchored": flow.anchored(a, b, m, mask, sigma),
        "fused": flow.fused(a, b, mask, 0.8),
    }
    for name, result in results.items():
        assert result.dtype == dtype, name
        error = (result.double() - expected[name]).abs().max().item()
        assert error <= TOLERANCES[dtype], f"{name}: {error}"


@shapes
def test_steps_do_not_write_into_their_arguments(flow: ModuleType, shape: tuple[int, ...]) -> None:
    a, b, c, m = (randn(shape, seed) for seed in (1, 2, 3, 4))
    kept = [t.clone() for t in (a, b, c, m)]
    mask = mask_for(shape)
    flow.noised(a, b, 0.5)
    flow.velocity(a, b, 0.5)
    flow.masked_delta_step(a, b, mask, -0.1)
    flow.blended_step(a, b, c, mask, -0.1)
    flow.anchored(a, b, m, mask, 0.5)
    flow.fused(a, b, mask, 0.5)
    assert all(torch.equal(now, then) for now, then in zip((a, b, c, m), kept, strict=True))


def test_steps_take_transposed_tensors(flow: ModuleType) -> None:
    a, b = randn((2, 16, 5, 7), 1), randn((2, 16, 5, 7), 2)
    mask = mask_for((2, 16, 5, 7))
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (a, b, mask)]
    assert not turned[0].is_contiguous()
    expected = flow.masked_delta_step(a, b, mask, -0.1)
    assert torch.equal(flow.masked_delta_step(*turned, -0.1), expected)
    assert torch.equal(flow.noised(*turned[:2], 0.3), flow.noised(a, b, 0.3))


@dtypes
def test_delta_stays_zero_where_the_mask_or_the_difference_is(
    flow: ModuleType, dtype: torch.dtype
) -> None:
    shape = (2, 16, 6, 5)
    mask, difference = mask_for(shape, dtype), randn(shape, 1, dtype)
    difference[:, :, 0] = 0
    delta = torch.zeros(shape, dtype=dtype)
    for step in (-0.3, -0.2, -0.5):
        delta = flow.masked_delta_step(delta, difference, mask, step)
    still = ((mask == 0) | (difference == 0)).expand_as(delta)
    assert not delta[still].any()
    assert delta[~still].all()


def test_velocity_undoes_noising(flow: ModuleType) -> None:
    clean, noise = randn((2, 16, 5, 7), 1).double(), randn((2, 16, 5, 7), 2).double()
    for sigma in (1.0, 0.6, 0.01):
        found = flow.velocity(flow.noised(clean, noise, sigma), clean, sigma)
        # 0.01 divides the rounding error of the latent by 100.
        assert torch.allclose(found, noise - clean, rtol=0, atol=1e-12)


def test_anchoring_is_exact_at_both_ends_of_the_mask(flow: ModuleType) -> None:
    latent, clean, noise = (randn((1, 16, 4, 4), seed) for seed in (1, 2, 3))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    result = flow.anchored(latent, clean, noise, mask, 0.4)
    assert torch.equal(result[..., :2], latent[..., :2])
    assert torch.equal(result[..., 2:], flow.noised(clean, noise, 0.4)[..., 2:])


@dtypes
@shapes
def test_fusing_is_exact_at_both_ends_of_the_weight(
    flow: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    latent, inverted = randn(shape, 1, dtype) * 100, randn(shape, 2, dtype) * 0.01
    mask = mask_for(shape)
    assert torch.equal(flow.fused(latent, inverted, mask, 0.0), latent)
    found = flow.fused(latent, inverted, mask, 1.0)
    inside, outside = ((mask == value).expand_as(found) for value in (1, 0))
    assert torch.equal(found[inside], latent[inside])
    assert torch.equal(found[outside], inverted[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@shapes
def test_noise_of_a_row_depends_on_its_generator_only(
    flow: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    like = torch.empty(0, dtype=dtype)
    generators = [torch.Generator().manual_seed(5 + row) for row in range(shape[0])]
    drawn = flow.draw_noise(shape, generators, like)
    assert drawn.shape == shape
    assert drawn.dtype == dtype
    for row in range(shape[0]):
        single = torch.Generator().manual_seed(5 + row)
        expected = torch.randn((1, *shape[1:]), generator=single).to(dtype)
        assert torch.equal(drawn[row : row + 1], expected)
    again = flow.draw_noise(shape, generators, like)
    assert not torch.equal(again, drawn)


def test_drawing_noise_leaves_the_global_generator_alone(flow: ModuleType) -> None:
    before = torch.get_rng_state()
    flow.draw_noise((2, 4, 4, 4), [torch.Generator().manual_seed(s) for s in (1, 2)], before)
    assert torch.equal(torch.get_rng_state(), before)
