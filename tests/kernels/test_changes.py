"""Differences that an edge off by a pixel does not make, and regions of change."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def changes(pack: ModuleType) -> ModuleType:
    return pack.kernels.changes


def edge(column: int) -> Tensor:
    """Black, and white from a column on: (1, 3, 12, 16)."""
    picture = torch.zeros(1, 3, 12, 16)
    picture[..., column:] = 1
    return picture


def random_pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 2, 3, 7, 9, generator=generator)
    return one, other


def everywhere() -> Tensor:
    return torch.ones(1, 12, 16)


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_tolerant_difference_against_a_naive_loop(changes: ModuleType, tolerance: int) -> None:
    a, b = random_pair()
    found = changes.tolerant_difference(a, b, tolerance)
    for index in range(2):
        for y in range(7):
            for x in range(9):
                rows = slice(max(0, y - tolerance), y + tolerance + 1)
                columns = slice(max(0, x - tolerance), x + tolerance + 1)
                worst = torch.tensor(0.0)
                for one, other in ((a, b), (b, a)):
                    window = other[index, :, rows, columns].flatten(1)
                    here = one[index, :, y, x]
                    beyond = torch.maximum(here - window.amax(1), window.amin(1) - here)
                    worst = torch.maximum(worst, beyond.clamp(min=0).max())
                assert found[index, y, x] == worst


def test_difference_is_the_largest_of_the_colours(changes: ModuleType) -> None:
    a, b = random_pair()
    assert torch.equal(changes.difference(a, b), (a - b).abs().max(1).values)


def test_an_edge_off_by_the_tolerance_is_no_change(changes: ModuleType) -> None:
    for off, tolerance, seen in ((1, 1, False), (2, 1, True), (2, 2, False), (1, 0, True)):
        found = changes.changed(edge(6), edge(6 + off), everywhere(), 0.1, tolerance, 0)
        assert bool(found.any()) == seen


def test_a_change_has_its_whole_extent(changes: ModuleType) -> None:
    """What the tolerance hides of a change beside an edge belongs to it."""
    before, after = torch.zeros(2, 1, 3, 12, 16)
    after[..., 3:9, 4:11] = 1
    found = changes.changed(before, after, everywhere(), 0.1, 1, 9)
    assert torch.equal(found, after[:, 0])


def test_specks_are_no_change(changes: ModuleType) -> None:
    before, after = torch.zeros(2, 1, 3, 12, 16)
    after[..., 3:5, 4:7] = 1
    for smallest, seen in ((6, True), (7, False)):
        found = changes.changed(before, after, everywhere(), 0.1, 0, smallest)
        assert bool(found.any()) == seen


def test_a_change_goes_on_where_nothing_is_shown(changes: ModuleType) -> None:
    before, after = torch.zeros(2, 1, 3, 12, 16)
    after[..., :5, :] = 1
    covered = everywhere()
    covered[..., 13:] = 0
    found = changes.changed(before, after, covered, 0.1, 0, 0)
    assert found[:, :5].all()
    assert not found[:, 5:].any()
    # What the made-up pixels show is not looked at.
    after[..., 13:] = 1
    again = changes.changed(before, after, covered, 0.1, 0, 0)
    assert torch.equal(again, found)
    assert not changes.changed(before, after, 0 * covered, 0.1, 0, 0).any()
