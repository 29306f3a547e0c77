"""The gate's value over a sampling run, against formulas written out."""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType

import pytest

PROGRESS = [i / 20 for i in range(21)]


@pytest.fixture(scope="module")
def gates(pack: ModuleType) -> ModuleType:
    return pack.kernels.gates


def over(gates: ModuleType, shape: str, first: float, last: float, *values: float) -> list[float]:
    return [gates.curve(shape, first, last, values, progress) for progress in PROGRESS]


def test_constant_stays_at_first(gates: ModuleType) -> None:
    assert over(gates, "constant", 0.3, 0.9) == [0.3] * len(PROGRESS)


def test_linear_goes_straight(gates: ModuleType) -> None:
    expected = [0.8 - 0.6 * progress for progress in PROGRESS]
    assert over(gates, "linear", 0.8, 0.2) == pytest.approx(expected)


def test_cosine_goes_by_half_a_wave(gates: ModuleType) -> None:
    found = over(gates, "cosine", 0.2, 0.8)
    expected = [0.5 - 0.3 * math.cos(math.pi * progress) for progress in PROGRESS]
    assert found == pytest.approx(expected)
    steps = [after - before for before, after in pairwise(found)]
    assert steps[0] == pytest.approx(steps[-1])
    assert steps[0] < steps[10] / 5


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_ends_are_hit_exactly(gates: ModuleType, shape: str) -> None:
    found = over(gates, shape, 0.3, 0.7)
    assert found[0] == 0.3
    assert found[-1] == pytest.approx(0.7)


def test_lists_are_read_in_straight_lines(gates: ModuleType) -> None:
    values = (0.0, 1.0, 0.5)
    found = over(gates, "list", 0.9, 0.9, *values)
    assert [found[0], found[10], found[20]] == list(values)
    assert found[5] == pytest.approx(0.5)
    assert found[15] == pytest.approx(0.75)


def test_a_list_of_one_is_constant(gates: ModuleType) -> None:
    assert over(gates, "list", 0, 0, 0.4) == [0.4] * len(PROGRESS)


def test_long_lists_keep_every_value(gates: ModuleType) -> None:
    values = tuple(i % 7 / 7 for i in range(51))
    found = [gates.curve("list", 0, 0, values, i / 50) for i in range(51)]
    assert found == pytest.approx(list(values))


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "list"])
def test_beyond_the_ends_the_value_is_the_ends(gates: ModuleType, shape: str) -> None:
    values = (0.1, 0.6, 0.9)
    for beyond, end in ((-0.5, 0.0), (1.5, 1.0)):
        expected = gates.curve(shape, 0.2, 0.8, values, end)
        assert gates.curve(shape, 0.2, 0.8, values, beyond) == expected


def test_shapes_are_those_that_are_listed(gates: ModuleType) -> None:
    assert gates.SHAPES == ("constant", "linear", "cosine", "list")
    for shape in gates.SHAPES:
        found = over(gates, shape, 0.2, 0.8, 0.3, 0.7)
        assert all(0.2 <= value <= 0.8 + 1e-12 for value in found)
