"""Solvers against the published formulas and against a flow whose way is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Step = Callable[[Velocity, Tensor, float, float], Tensor]

NAMES = ("Euler", "RFSolver", "FireFlow")
names = pytest.mark.parametrize("name", NAMES)
UNEVEN = [1.0, 0.93, 0.7, 0.66, 0.31, 0.3, 0.0]
schedules = pytest.mark.parametrize("schedule", [UNEVEN, UNEVEN[::-1]], ids=["falling", "rising"])


@pytest.fixture(scope="module")
def solvers(pack: ModuleType) -> ModuleType:
    return pack.kernels.solvers


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 4, 3, 5), generator=generator, dtype=torch.float64)


def curved(x: Tensor, sigma: float) -> Tensor:
    """A flow that depends on place and time, and neither way linearly."""
    return torch.sin(2 * x + 3 * sigma) + sigma**2 * x.flip(-1)


def known(x: Tensor, sigma: float) -> Tensor:
    """dx/dsigma = 2 sigma x, whose way is x(0) exp(sigma^2)."""
    return 2 * sigma * x


def known_way(x: Tensor, sigma: float, following: float) -> Tensor:
    return x * math.exp(following**2 - sigma**2)


def solved(solver: Any, velocity: Velocity, x: Tensor, schedule: list[float]) -> Tensor:
    for sigma, following in pairwise(schedule):
        x, _ = solver.step(velocity, x, sigma, following)
    return x


def even(steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps + 1)]


# The published formulas


def euler(velocity: Velocity, x: Tensor, s: float, n: float) -> Tensor:
    return x + (n - s) * velocity(x, s)


def midpoint(velocity: Velocity, x: Tensor, s: float, n: float) -> Tensor:
    middle = euler(velocity, x, s, (s + n) / 2)
    return x + (n - s) * velocity(middle, (s + n) / 2)


def taylor(velocity: Velocity, x: Tensor, s: float, n: float) -> Tensor:
    """RF-Solver's expansion, its derivative taken over half a step, as its code has it."""
    h, v = n - s, velocity(x, s)
    derivative = (velocity(x + h / 2 * v, s + h / 2) - v) / (h / 2)
    return x + h * v + h**2 / 2 * derivative


@pytest.mark.parametrize(
    ("name", "step"),
    [("Euler", euler), ("RFSolver", midpoint), ("RFSolver", taylor)],
    ids=["Euler", "midpoint rule", "published expansion"],
)
@schedules
def test_a_step_is_its_formula(
    solvers: ModuleType, name: str, step: Step, schedule: list[float]
) -> None:
    x = expected = randn(1)
    solver = getattr(solvers, name)()
    for sigma, following in pairwise(schedule):
        x, _ = solver.step(curved, x, sigma, following)
        expected = step(curved, expected, sigma, following)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)


@schedules
def test_fireflow_takes_the_last_middle_for_the_next_start(
    solvers: ModuleType, schedule: list[float]
) -> None:
    x = randn(1)
    expected, last = x, curved(x, schedule[0])
    for s, n in pairwise(schedule):
        last = curved(expected + (n - s) / 2 * last, (s + n) / 2)
        expected = expected + (n - s) * last
    found = solved(solvers.FireFlow(), curved, x, schedule)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert (found - solved(solvers.RFSolver(), curved, x, schedule)).abs().max() > 1e-3


@schedules
def test_fireflow_is_the_midpoint_rule_where_only_time_counts(
    solvers: ModuleType, schedule: list[float]
) -> None:
    start, slope = randn(1), randn(2)

    def linear(_x: Tensor, sigma: float) -> Tensor:
        return start + sigma * slope

    x, (first, last) = randn(3), (schedule[0], schedule[-1])
    exact = x + (last - first) * start + (last**2 - first**2) / 2 * slope
    for name in ("FireFlow", "RFSolver"):
        found = solved(getattr(solvers, name)(), linear, x, schedule)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-13)
    assert (solved(solvers.Euler(), linear, x, schedule) - exact).abs().max() > 0.05


@pytest.mark.parametrize(("name", "calls"), [("Euler", 6), ("RFSolver", 12), ("FireFlow", 7)])
def test_evaluations_of_a_run(solvers: ModuleType, name: str, calls: int) -> None:
    asked = []

    def counted(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return curved(x, sigma)

    solved(getattr(solvers, name)(), counted, randn(1), UNEVEN)
    assert len(asked) == calls
    middles = [(a + b) / 2 for a, b in pairwise(UNEVEN)]
    expected = {
        "Euler": UNEVEN[:-1],
        "RFSolver": [s for pair in zip(UNEVEN, middles, strict=False) for s in pair],
        "FireFlow": [UNEVEN[0], *middles],
    }
    assert asked == pytest.approx(expected[name])


@names
@schedules
def test_the_velocity_returned_is_the_one_that_led_there(
    solvers: ModuleType, name: str, schedule: list[float]
) -> None:
    solver, x = getattr(solvers, name)(), randn(1)
    kept = x.clone()
    for sigma, following in pairwise(schedule):
        after, v = solver.step(curved, x, sigma, following)
        torch.testing.assert_close(after, x + (following - sigma) * v, rtol=0, atol=1e-15)
        assert torch.equal(x, kept), "written into"
        x, kept = after, after.clone()


# How exact they are


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("RFSolver", 2), ("FireFlow", 2)])
@pytest.mark.parametrize("rising", [False, True])
def test_order_of_convergence(solvers: ModuleType, name: str, order: int, rising: bool) -> None:
    x, errors = randn(1), []
    for steps in (32, 64, 128):
        schedule = even(steps)[::-1] if rising else even(steps)
        found = solved(getattr(solvers, name)(), known, x, schedule)
        errors.append(float((found - known_way(x, schedule[0], schedule[-1])).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_there_and_back_again(solvers: ModuleType) -> None:
    x, schedule = randn(1), even(16)
    errors = {}
    for name in NAMES:
        solver = getattr(solvers, name)
        noise = solved(solver(), curved, x, schedule[::-1])
        assert (noise - x).abs().max() > 0.3
        errors[name] = float((solved(solver(), curved, noise, schedule) - x).abs().max())
    assert errors["RFSolver"] < errors["Euler"] / 20
    assert errors["FireFlow"] < errors["Euler"] / 5


# RF-Inversion


def test_full_pull_to_the_image_returns_it(solvers: ModuleType) -> None:
    x, image = randn(1), randn(2)

    def drawn(x: Tensor, sigma: float) -> Tensor:
        return solvers.towards_image(curved(x, sigma), x, image, sigma, 1.0)

    found = solved(solvers.Euler(), drawn, x, UNEVEN)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-14)


@pytest.mark.parametrize("end", [1.0, 0.8])
def test_full_pull_to_noise_is_the_straight_way_there(solvers: ModuleType, end: float) -> None:
    x, noise = randn(1), randn(2)

    def drawn(x: Tensor, sigma: float) -> Tensor:
        return solvers.towards_noise(curved(x, sigma), x, noise, sigma, 1.0)

    found = solved(solvers.Euler(), drawn, x, [0.0, 0.1, 0.45, 0.5, end])
    torch.testing.assert_close(found, (1 - end) * x + end * noise, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pull", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pulls_mix_two_velocities(solvers: ModuleType, pull: float, dtype: torch.dtype) -> None:
    v, x, goal = (randn(seed).to(dtype) for seed in (1, 2, 3))
    to_noise = solvers.towards_noise(v, x, goal, 0.6, pull)
    to_image = solvers.towards_image(v, x, goal, 0.6, pull)
    exact, at, end = (t.double() for t in (v, x, goal))
    tolerance = 8 * torch.finfo(dtype).eps * 16
    for found, straight in ((to_noise, (end - at) / 0.4), (to_image, (at - end) / 0.6)):
        assert found.dtype == dtype
        expected = (1 - pull) * exact + pull * straight
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        if pull == 0:
            assert torch.equal(found, v)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, (0.0, 0.0, 0.0)),
        (0.19, (0.0, 0.0, 0.0)),
        (0.2, (0.8, 0.0, 0.8)),
        (0.35, (0.8, 0.2, 0.6)),
        (0.5, (0.8, 0.4, 0.4)),
        (0.8, (0.0, 0.0, 0.0)),
        (1.0, (0.0, 0.0, 0.0)),
    ],
)
def test_strength_in_its_window(
    solvers: ModuleType, progress: float, expected: tuple[float, ...]
) -> None:
    found = [
        solvers.strength_at(progress, 0.8, 0.2, 0.8, trend)
        for trend in ("constant", "rising", "falling")
    ]
    assert found == pytest.approx(expected)


def test_empty_and_whole_windows(solvers: ModuleType) -> None:
    for start, end in ((0.5, 0.5), (0.7, 0.2)):
        assert not any(solvers.strength_at(p / 10, 1.0, start, end, "rising") for p in range(11))
    whole = [solvers.strength_at(i / 7, 1.0, 0.0, 1.0, "constant") for i in range(7)]
    assert whole == [1.0] * 7
