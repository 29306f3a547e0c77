"""Every kernel that has two bodies, either of them against the same formulas in float64.

Without a GPU, Triton's are interpreted: that shows what they compute, not that they compile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

# Rounding to each dtype of numbers of a few units; Triton's interpreter cuts bfloat16 off
# instead.
EPS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
dtypes = pytest.mark.parametrize("dtype", EPS, ids=str)
Bodies = Callable[[], Iterator[str]]
device = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("PINPOINT_KERNELS", request.param)
    return request.param


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Bodies:
    """A function that chooses one body after the other."""
    pytest.importorskip("triton")

    def choose() -> Iterator[str]:
        for name in ("torch", "triton"):
            monkeypatch.setenv("PINPOINT_KERNELS", name)
            yield name

    return choose


@pytest.fixture(scope="module")
def kernels(pack: ModuleType) -> ModuleType:
    for name in ("attention", "flow", "masks", "tokens"):
        importlib.import_module(f"{pack.__name__}.kernels.{name}")
    return pack.kernels


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device, dtype)


def strided(t: Tensor) -> Tensor:
    """The same numbers with gaps between them, the first two axes in the other order."""
    wide = t.new_full((t.shape[1], t.shape[0], *t.shape[2:-1], 2 * t.shape[-1]), 99)
    view = wide.transpose(0, 1)[..., ::2]
    view.copy_(t)
    return view


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


# Attention: batch, heads of queries and of keys, queries, keys, width, groups.
LOOKS = {
    "one of each": (1, 1, 1, 1, 1, 1, 1),
    "several blocks": (1, 2, 1, 131, 67, 9, 3),
    "wide": (1, 1, 1, 5, 21, 257, 2),
    "odd": (2, 6, 3, 7, 33, 20, 17),
}
looks = pytest.mark.parametrize("size", LOOKS.values(), ids=LOOKS)


def look(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and columns of any strides."""
    batch, heads, kv_heads, queries, keys, width, groups = size
    q = strided(randn(1, batch, heads, queries, width, dtype=dtype) * 2)
    k = strided(randn(2, batch, kv_heads, keys, width, dtype=dtype))
    return q, k, randn(3, batch, groups, keys).transpose(1, 2)


def whole_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, Q, K) in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ k.double().mT * scale).softmax(-1).mean(1)


@looks
@dtypes
@pytest.mark.usefixtures("body")
def test_attention_both_ways_is_that_of_the_whole_map(
    kernels: ModuleType, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, columns = look(size, dtype)
    expected = whole_map(q, k, 0.4)
    to = kernels.attention.attention_to(q, k, columns, 0.4)
    assert to.dtype == torch.float32
    close(to, expected @ columns.double(), 1e-5)
    shared = kernels.attention.attention_to(q, k, columns[0], 0.4)
    close(shared, expected @ columns[0].double(), 1e-5)
    back = kernels.attention.attention_from(q, k, 0.4)
    assert back.dtype == torch.float32
    close(back, expected, 1e-5)


@pytest.mark.usefixtures("body")
def test_scores_that_no_exponential_holds(kernels: ModuleType) -> None:
    q, k, columns = look(LOOKS["odd"], torch.float32)
    q, expected = q * 1000, whole_map(q * 1000, k, 0.4)
    close(kernels.attention.attention_to(q, k, columns, 0.4), expected @ columns.double(), 2e-3)
    close(kernels.attention.attention_from(q, k, 0.4), expected, 2e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_attention_makes_the_same_of_what_is_not_finite(
    kernels: ModuleType, both: Bodies, bad: float
) -> None:
    q, k, columns = (t.clone() for t in look((1, 2, 2, 4, 70, 8, 2), torch.float32))
    bad_q, bad_k = q.clone(), k.clone()
    bad_q[0, 1, 2, 3] = bad_k[0, 0, 69, 1] = bad
    # All scores of one key are -inf, and all of one query.
    seen, nothing = q.abs(), k.abs()
    nothing[0, 0, 5] = seen[0, 0, 1] = -torch.inf
    pairs = (bad_q, k), (q, bad_k), (q.abs(), bad_k), (q.abs(), nothing), (seen, k.abs())
    found = [
        [
            result
            for pair in pairs
            for result in (
                kernels.attention.attention_to(*pair, columns, 1.0),
                kernels.attention.attention_from(*pair, 1.0),
            )
        ]
        for _ in both()
    ]
    for one, other in zip(*found, strict=True):
        same(one, other)
    assert found[1][1][:, 2].isnan().any()
    assert found[1][1][:, [0, 1, 3]].isfinite().all()
    assert all(result.isfinite().all() for result in found[1][6:])


# Values: batch, heads, tokens, width.
VALUES = {"one of each": (1, 1, 1, 1), "odd": (3, 2, 67, 13), "wide": (1, 1, 3, 130)}


@pytest.mark.parametrize("size", VALUES.values(), ids=VALUES)
@dtypes
@pytest.mark.usefixtures("body")
def test_values_are_blended_in_place_and_exactly_at_both_ends(
    kernels: ModuleType, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, _, length, _ = size
    given = randn(1, *size, dtype=dtype)
    # A recording may be of one row and of another dtype, a weight of one row.
    exact = dtype if dtype == torch.bfloat16 else torch.float32
    other = strided(randn(2, 1, *size[1:], dtype=exact))
    weight = torch.linspace(0, 1, length + 2, device=device)[None, 1:-1].clone()
    weight[0, ::4], weight[0, 1::4] = 0, 1
    whole = given.new_full((batch, 2 + length, size[1], 2 * size[3]), 7)
    values = whole.transpose(1, 2)[:, :, 1 : 1 + length, ::2]
    values.copy_(given)
    kernels.attention.blend_into(values, other, weight)
    taken = other.to(dtype).expand_as(given)
    ends = (weight == 0, given), (weight == 1, taken)
    for chosen, expected in ends:
        assert torch.equal(values[:, :, chosen[0]], expected[:, :, chosen[0]])
    between = weight.to(dtype).double()[:, None, :, None]
    expected = given.double() + between * (taken.double() - given.double())
    close(values, expected, EPS[dtype])
    assert (whole[:, [0, -1]] == 7).all()
    assert (whole[..., 1::2] == 7).all()


def test_blending_makes_the_same_of_what_is_not_finite(kernels: ModuleType, both: Bodies) -> None:
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0, -0.0], device=device)
    values = bad.view(1, 1, 1, 5, 1).expand(1, 1, 5, 5, 1).reshape(1, 1, 25, 1)
    other = bad.view(1, 1, 5, 1, 1).expand(1, 1, 5, 5, 1).reshape(1, 1, 25, 1)
    for share in (0.0, 0.25, 0.75, 1.0):
        found = []
        for _ in both():
            own = values.clone()
            kernels.attention.blend_into(own, other, torch.full((1, 25), share, device=device))
            found.append(own)
        same(*found)


# Steps: shapes of latents, and noises in each call of the model.
STEPS = {
    "one cell": ((1, 1, 1, 1), [1]),
    "odd": ((3, 5, 33, 37), [2, 1]),
    "video": ((2, 3, 4, 5, 7), [3]),
}
steps = pytest.mark.parametrize(("shape", "draws"), STEPS.values(), ids=STEPS)


def velocities(
    shape: tuple[int, ...], draws: list[int], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, int]]:
    """As an edit's calls give them; in the first row they agree."""
    found = []
    for call, count in enumerate(draws):
        size = (count * shape[0], *shape[1:])
        target, source = (randn(10 * call + i, *size, dtype=dtype) for i in (1, 2))
        target[..., 0, :] = source[..., 0, :]
        found.append((strided(target), source, count))
    return found


@steps
@dtypes
@pytest.mark.usefixtures("body")
def test_steps_move_by_the_mean_difference_inside_the_mask(
    kernels: ModuleType, shape: tuple[int, ...], draws: list[int], dtype: torch.dtype
) -> None:
    delta, calls = strided(randn(9, *shape, dtype=dtype)), velocities(shape, draws, dtype)
    count, kept = sum(draws), delta.clone()
    soft = (randn(8, shape[0], *[1] * (len(shape) - 3), *shape[-2:]) + 0.5).clamp(0, 1)
    for mask in (soft.to(dtype), delta.new_ones(())):
        found, mean = kernels.flow.moved(delta, iter(calls), mask, -0.3, count)
        assert found.dtype == mean.dtype == dtype
        assert torch.equal(delta, kept)
        parts = ((t.double() - s.double()).unflatten(0, (n, -1)).sum(0) for t, s, n in calls)
        difference = torch.stack([*parts]).sum(0) / count
        close(mean, difference, EPS[dtype])
        close(found, delta.double() - 0.3 * mask.double() * difference, EPS[dtype])
        still = ((mask == 0) | (difference == 0)).expand_as(delta)
        assert torch.equal(found[still], delta[still])
        assert still.any()


def test_steps_make_the_same_of_what_is_not_finite(kernels: ModuleType, both: Bodies) -> None:
    shape = (1, 2, 3, 4)
    ((target, source, _),) = velocities(shape, [2], torch.float32)
    target, source, delta = target.clone(), source.clone(), randn(9, *shape)
    target[0, 0, 1], source[1, 0, 2, :2], delta[0, 1, 2] = torch.nan, torch.inf, -torch.inf
    mask = torch.tensor([0, 0.5, 1, 0], device=device).expand(1, 1, 3, 4)
    found = [kernels.flow.moved(delta, [(target, source, 2)], mask, -0.3, 2) for _ in both()]
    for one, other in zip(*found, strict=True):
        same(one, other)
    assert found[1][0].isnan().any()


# Mask statistics


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 17, 19), (2, 3, 4, 5, 7)], ids=str)
@dtypes
@pytest.mark.usefixtures("body")
def test_velocity_difference_is_the_mean_over_channels_and_frames(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    target, source = strided(randn(1, *shape, dtype=dtype)), randn(2, *shape, dtype=dtype)
    found = kernels.masks.velocity_difference(target, source)
    assert found.dtype == dtype
    expected = (target.double() - source.double()).abs().flatten(-2).flatten(1, -2).mean(1)
    close(found, expected.view(shape[0], *shape[-2:]), EPS[dtype])


def test_velocity_difference_makes_the_same_of_what_is_not_finite(
    kernels: ModuleType, both: Bodies
) -> None:
    target, source = randn(1, 2, 3, 2, 5), randn(2, 2, 3, 2, 5)
    target[0, 1, 0, :2], target[1, 2, 1, 1], source[1, 2, 1] = torch.nan, torch.inf, torch.inf
    same(*(kernels.masks.velocity_difference(target, source) for _ in both()))


# Tokens


@pytest.mark.parametrize("places", [[], [18], [18, 0, 7, 16, 3]], ids=str)
@dtypes
@pytest.mark.usefixtures("body")
def test_tokens_are_taken_and_put_back_bit_for_bit(
    kernels: ModuleType, dtype: torch.dtype, places: list[int]
) -> None:
    index = torch.tensor(places, dtype=torch.long, device=device)
    kept = strided(randn(1, 2, 19, 261, dtype=dtype))
    active = strided(randn(2, 2, len(places), 261, dtype=dtype))
    kept[0, 0, 0], kept[1, 7, 3] = torch.nan, -torch.inf
    before = kept.clone()
    found = kernels.tokens.gathered(kept, index)
    assert found.is_contiguous()
    torch.testing.assert_close(found, before[:, places], rtol=0, atol=0, equal_nan=True)
    before[:, places] = active
    found = kernels.tokens.scattered(active, kept, index)
    assert found.is_contiguous()
    torch.testing.assert_close(found, before, rtol=0, atol=0, equal_nan=True)
    assert found.data_ptr() != kept.data_ptr()
