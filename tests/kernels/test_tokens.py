"""Tokens taken out and put back, token by token."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# Batch, tokens, width, and the places of the active ones.
CASES = {
    "one of each": (1, 1, 1, [0]),
    "none": (2, 5, 3, []),
    "some, in any order": (3, 7, 5, [6, 0, 3]),
    "all": (2, 3, 4, [2, 1, 0]),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def tokens(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.kernels.tokens")


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cases
@dtypes
def test_tokens_are_taken_and_put_back_bit_for_bit(
    tokens: ModuleType, case: tuple[int, int, int, list[int]], dtype: torch.dtype
) -> None:
    batch, length, width, places = case
    kept = randn(1, batch, length, width, dtype=dtype)
    active = randn(2, batch, len(places), width, dtype=dtype)
    index = torch.tensor(places, dtype=torch.long)
    found = tokens.gathered(kept, index)
    assert found.shape == (batch, len(places), width)
    assert all(torch.equal(found[:, i], kept[:, place]) for i, place in enumerate(places))
    whole = tokens.scattered(active, kept, index)
    for place in range(length):
        from_ = active[:, places.index(place)] if place in places else kept[:, place]
        assert torch.equal(whole[:, place], from_)


def test_any_strides_and_nothing_is_written_into(tokens: ModuleType) -> None:
    kept, active = randn(1, 7, 2, 5).transpose(0, 1), randn(2, 5, 3, 2).permute(2, 1, 0)
    before, index = kept.clone(), torch.tensor([4, 1, 6])
    whole = tokens.scattered(active, kept, index)
    assert torch.equal(kept, before)
    assert whole.is_contiguous()
    assert torch.equal(tokens.gathered(whole, index), active)
    rest = torch.tensor([0, 2, 3, 5])
    assert torch.equal(tokens.gathered(whole, rest), tokens.gathered(kept, rest))
