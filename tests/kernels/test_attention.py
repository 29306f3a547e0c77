"""Attention maps against whole softmax maps in float64, and the memory that they take instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# Batch, heads, queries, keys, width, groups.
SIZES = {
    "one of each": (1, 1, 1, 1, 1, 1),
    "odd": (3, 5, 7, 11, 13, 3),
    "more queries": (2, 2, 37, 5, 8, 2),
    "more keys": (1, 3, 4, 129, 6, 4),
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


@pytest.fixture(scope="module")
def attention(pack: ModuleType) -> ModuleType:
    return pack.kernels.attention


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(
    q: Tensor, k: Tensor, columns: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """The mean over heads of the whole map, in float64; `mask` is additive and has four axes."""
    scores = q.double() @ k.double().mT * scale
    if mask is not None:
        scores = scores + mask.double()
    columns = columns.double()
    return (scores.softmax(-1) @ (columns[:, None] if columns.ndim == 3 else columns)).mean(1)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


@sizes
@dtypes
def test_attention_is_that_of_the_whole_map(
    attention: ModuleType, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, heads, queries, keys, width, groups = size
    q = randn(1, batch, heads, queries, width, dtype=dtype) * 2
    k = randn(2, batch, heads, keys, width, dtype=dtype)
    shared, own = randn(3, keys, groups), randn(4, batch, keys, groups)
    scale = width**-0.5
    for columns in (shared, own):
        found = attention.attention_to(q, k, columns, scale)
        assert found.shape == (batch, queries, groups)
        assert found.dtype == torch.float32
        assert close(found, whole(q, k, columns, scale))


@sizes
@dtypes
def test_maps_are_spread_by_taking_means(
    attention: ModuleType, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, heads, tokens, _, width, groups = size
    q, k = (randn(seed, batch, heads, tokens, width, dtype=dtype) * 2 for seed in (1, 2))
    maps = randn(3, batch, tokens, groups, dtype=dtype)
    found = attention.attention_to(q, k, maps, 0.7)
    assert found.dtype == torch.float32
    assert close(found, whole(q, k, maps, 0.7))
    # What is the same everywhere stays so.
    level = attention.attention_to(q, k, torch.ones_like(maps), 0.7)
    assert close(level, torch.ones_like(level).double())


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_fewer_heads_of_keys_are_repeated(attention: ModuleType, kv_heads: int) -> None:
    q, k = randn(1, 2, 6, 9, 8), randn(2, 2, kv_heads, 9, 8)
    columns = randn(3, 9, 2)
    # Query head h goes with key head h // (6 // kv_heads), as in torch's enable_gqa.
    full = torch.stack([k[:, h // (6 // kv_heads)] for h in range(6)], 1)
    assert close(attention.attention_to(q, k, columns, 0.4), whole(q, full, columns, 0.4))


MASKS = {
    "queries x keys": (6, 10),
    "1 x 1 x queries x keys": (1, 1, 6, 10),
    "batch x 1 x queries x keys": (3, 1, 6, 10),
    "1 x heads x queries x keys": (1, 2, 6, 10),
    "batch x heads x queries x keys": (3, 2, 6, 10),
    "batch x 1 x 1 x keys": (3, 1, 1, 10),
    "1 x 1 x 1 x keys": (1, 1, 1, 10),
    "batch x queries x keys": (3, 6, 10),
    "1 x queries x keys": (1, 6, 10),
    "batch x 1 x keys": (3, 1, 10),
    "1 x keys": (1, 10),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["bool", "additive", "additive fp16"])
@pytest.mark.parametrize("scores", [2**22, 3 * 2 * 10 * 4, 1])
def test_masks_in_every_form(
    attention: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    kind: str,
    scores: int,
) -> None:
    monkeypatch.setattr(attention, "largest_scores", scores)
    q, k, columns = randn(1, 3, 2, 6, 8), randn(2, 3, 2, 10, 8), randn(3, 3, 10, 2)
    if kind == "bool":
        mask = randn(4, *shape) > -0.3
        mask[..., 0] = True
        added = torch.zeros(shape).masked_fill(~mask, -torch.inf)
    else:
        added = mask = randn(4, *shape, dtype=torch.float16 if "16" in kind else torch.float32)
    expected = whole(q, k, columns, 0.5, added[:, None] if added.ndim == 3 else added)
    assert close(attention.attention_to(q, k, columns, 0.5, mask), expected)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_sees_nothing_attends_to_nothing(attention: ModuleType, kind: str) -> None:
    q, k, columns = randn(1, 1, 2, 5, 8), randn(2, 1, 2, 7, 8), randn(3, 7, 2)
    seen = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    seen[:, :, 3] = False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found = attention.attention_to(q, k, columns, 0.5, mask)
    expected = whole(q, k, columns, 0.5)
    expected[:, 3] = 0
    assert close(found, expected)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 12, 13, 14, 100])
def test_chunks_make_no_difference(
    attention: ModuleType, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    q, k = randn(1, 2, 3, 13, 8), randn(2, 2, 3, 13, 8)
    columns, mask = randn(3, 13, 2), randn(5, 2, 1, 13, 13)
    asked = []
    real = Tensor.exp_

    def counted(scores: Tensor, *args: Any) -> Tensor:
        asked.append(scores.shape[2])
        return real(scores, *args)

    monkeypatch.setattr(Tensor, "exp_", counted)
    monkeypatch.setattr(attention, "largest_scores", 2 * 3 * 13 * chunk + 5)
    found = attention.attention_to(q, k, columns, 0.5, mask)
    monkeypatch.undo()
    assert close(found, whole(q, k, columns, 0.5, mask))
    assert len(asked) == math.ceil(13 / chunk)
    assert max(asked) == min(chunk, 13)


def test_arguments_are_not_written_into(attention: ModuleType) -> None:
    given = [randn(1, 1, 2, 6, 4), randn(2, 1, 2, 6, 4), randn(3, 1, 6, 2), randn(4, 6, 6)]
    kept = [t.clone() for t in given]
    q, k, maps, mask = given
    attention.attention_to(q, k, maps, 0.5, mask)
    attention.blended_values(q, k, torch.full((1, 6), 0.5))
    assert all(torch.equal(now, then) for now, then in zip(given, kept, strict=True))


# Memory


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.size = max(self.size, leaf.numel() * leaf.element_size())
        return made


@pytest.fixture
def largest(attention: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Largest]:
    monkeypatch.setattr(attention, "largest_scores", 2**18)
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("spread", [False, True], ids=["to the prompt", "along the picture"])
@pytest.mark.parametrize("tokens", [1024, 4096, 9216])
def test_memory_does_not_grow_with_the_square(
    attention: ModuleType, largest: Largest, tokens: int, spread: bool
) -> None:
    heads, width = 2, 8
    q, k = (randn(seed, 1, heads, tokens, width, dtype=torch.float16) for seed in (1, 2))
    largest.size = 0
    if spread:
        attention.attention_to(q, k, torch.ones(1, tokens, 2), 0.3)
    else:
        mask = torch.zeros(1, 1, 1, tokens)
        attention.attention_to(q, k, torch.ones(tokens, 2), 0.3, mask)
    constant, linear = 4 * 2**18, 4 * heads * tokens * width
    assert largest.size <= max(constant, linear)
    assert largest.size < 4 * heads * tokens**2 / 7


def test_the_recorder_of_memory_sees_whole_maps(largest: Largest) -> None:
    q, k = randn(1, 1, 2, 1024, 8), randn(2, 1, 2, 1024, 8)
    largest.size = 0
    whole(q, k, torch.ones(1024, 2), 0.3)
    assert largest.size >= 8 * 2 * 1024**2


# Values


@dtypes
@pytest.mark.parametrize("rows", [1, 3])
def test_blended_values_are_exact_at_both_ends(
    attention: ModuleType, dtype: torch.dtype, rows: int
) -> None:
    values = randn(1, 3, 2, 6, 4, dtype=dtype) * 300
    recorded = randn(2, rows, 2, 6, 4) * 0.01
    weight = torch.tensor([[0.0, 1.0, 0.5, 0.25, 1.0, 0.0]])
    found = attention.blended_values(values, recorded, weight)
    assert found.dtype == dtype
    own, other = [0, 5], [1, 4]
    kept = recorded.to(dtype).expand_as(values)
    assert torch.equal(found[:, :, own], values[:, :, own])
    assert torch.equal(found[:, :, other], kept[:, :, other])
    expected = values.double() + weight.double().view(1, 1, 6, 1) * (kept.double() - values)
    tolerance = 600 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_values_far_apart_stay_finite(attention: ModuleType) -> None:
    """Their difference can be more than fp16 holds."""
    values, recorded = (torch.full((1, 1, 2, 1), s * 6e4, dtype=torch.float16) for s in (-1, 1))
    found = attention.blended_values(values, recorded, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(found[:, :, 0], values[:, :, 0])
    assert torch.equal(found[:, :, 1], recorded[:, :, 1])


def test_each_row_has_its_own_weight(attention: ModuleType) -> None:
    values, recorded = randn(1, 2, 3, 4, 5), randn(2, 2, 3, 4, 5)
    weight = torch.tensor([[0.0] * 4, [1.0] * 4])
    found = attention.blended_values(values, recorded, weight)
    assert torch.equal(found[0], values[0])
    assert torch.equal(found[1], recorded[1])


@dtypes
def test_confined_keys_have_no_weight_outside_and_their_share_inside(
    attention: ModuleType, dtype: torch.dtype
) -> None:
    q, k = (
        randn(seed, 2, 3, length, 8, dtype=dtype).float() * 9 for seed, length in ((1, 7), (2, 5))
    )
    inside = torch.tensor([[0, 0.25, 1, 1], [1, 0, 0, 0.5]], dtype=dtype)
    bias = attention.confining_bias(inside, 2, [1, 4], [0], (7, 5))
    assert bias.dtype == dtype
    assert bias.isfinite().all()
    shares = torch.zeros(2, 7).index_fill(1, torch.tensor([0]), 1)
    shares[:, 2:6] = inside.float()
    weights = (q @ k.mT).double().softmax(-1)
    weights[..., [1, 4]] *= shares[:, None, :, None]
    found = (q @ k.mT + bias[:, None].float()).double().softmax(-1)
    torch.testing.assert_close(found, weights / weights.sum(-1, keepdim=True), rtol=2e-2, atol=1e-6)
    assert (found[..., [1, 4]][(shares == 0)[:, None].expand(2, 3, 7)] == 0).all()
    # Also where a backend takes keys in chunks, of which one may hold these keys only.
    assert bias[..., [1, 4]].softmax(-1).isfinite().all()


def test_masks_of_all_forms_go_with_a_bias(attention: ModuleType) -> None:
    bias = randn(3, 2, 1, 4, 5)
    added = randn(4, 2, 4, 5)
    with_bias = attention.with_bias
    assert with_bias(None, bias) is bias
    assert torch.equal(with_bias(added[0], bias), bias + added[0])
    assert torch.equal(with_bias(added[:, :1], bias), bias + added[:, None, :1])
    assert torch.equal(with_bias(added[:, None], bias), bias + added[:, None])
    lowest = torch.finfo(torch.float32).min
    seen = added > 0
    found = with_bias(seen, bias)
    assert torch.equal(found[seen[:, None]], bias[seen[:, None]])
    assert (found[~seen[:, None]] == lowest / 2).all()
    both = with_bias(torch.full((4, 5), -torch.inf), torch.full((2, 1, 4, 5), lowest / 2))
    assert both.isfinite().all()
