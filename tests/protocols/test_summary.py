"""Figures of rows: what is compared, how it is scaled, and how sure a median is."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from host.comfyui import PACK
from protocols import summary
from protocols.cases import Protocol


def test_intervals_hold_the_median_and_shrink_with_the_cases() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for count in (10, 1000):
        values = rng.normal(20, 3, count)
        low, high = summary.interval(values, [*map(str, range(count))])
        assert low is not None
        assert high is not None
        assert low <= np.median(values) <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 4
    assert summary.interval(np.full(5, 3.0), [*"abcde"]) == (3.0, 3.0)


def test_intervals_cover_the_median_of_dependent_cases() -> None:
    rng, clusters, each, covered = np.random.default_rng(2), 30, 6, 0
    names = [str(index) for index in range(clusters) for _ in range(each)]
    for _ in range(100):
        values = np.repeat(rng.normal(0, 1, clusters), each) + rng.normal(0, 0.5, len(names))
        low, high = summary.interval(values, names)
        assert low is not None
        assert high is not None
        covered += low <= 0 <= high
    assert covered >= 85


def test_of_few_pictures_there_is_no_interval() -> None:
    assert summary.interval(np.arange(40.0), [*"abcd"] * 10) == (None, None)
    rows: list[dict[str, Any]] = [{"method": "m", "case": "1", "scores": {"identity": 0.5}}]
    (one,) = summary.figures(rows, ("identity",), {"1": "a"})
    assert (one.low, one.high) == (None, None)
    assert summary.table([one]).endswith("| 0.5 | 0.5 |  |")


def test_the_middle_of_an_even_number_is_between_two() -> None:
    values = np.array([4.0, 1.0, 3.0, 2.0, 6.0, 5.0])
    drawn = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=summary.resamples)
    medians = [np.median(np.repeat(np.sort(values), counts)) for counts in drawn]
    # Clusters are drawn in the order of their names.
    names = [*"dacbfe"]
    assert summary.interval(values, names) == tuple(np.quantile(medians, [0.025, 0.975]))


def test_methods_are_compared_on_what_all_have_made() -> None:
    rows: list[dict[str, Any]] = [
        {"method": "a", "case": "1", "scores": {"identity": 0.2}},
        {"method": "a", "case": "2", "scores": {"identity": 0.9}},
        {"method": "b", "case": "1", "scores": {"identity": 0.3}},
        {"method": "b", "case": "2", "error": "out of memory"},
        {"method": "none", "case": "1", "error": "out of memory"},
    ]
    good = summary.shared(rows)
    found = summary.figures(good, ("identity",), {"1": "a", "2": "b"})
    assert [(one.method, one.count, one.mean) for one in found] == [("a", 1, 0.2), ("b", 1, 0.3)]
    assert summary.errors(rows) == {"a": 0, "b": 1, "none": 1}


def test_what_was_not_measured_is_said_with_its_option() -> None:
    scores = ("background lpips", "dino-i", "clip-i", "clip inside", "background psnr", "identity")
    protocol = Protocol("pie-bench", [], scores, lpips="squeeze")
    one = summary.Figure("m", "identity", "", 1, 0.5, 0.5, None, None)
    given = {"lpips": "", "clip": "", "clip_vision": "l", "dino": "", "identity": "i"}
    assert summary.not_measured(protocol, [one], given) == [
        "not measured: background lpips (give --lpips squeeze, the published network)",
        "not measured: dino-i (give --dino)",
        "not measured: clip-i (no case has what it takes, such as a mask)",
        "not measured: clip inside (give --clip)",
        "not measured: background psnr (no case has what it takes, such as a mask)",
    ]
    assert not summary.not_measured(protocol, [], given), "nothing is judged yet"


def test_scales_are_the_papers() -> None:
    rows: list[dict[str, Any]] = [
        {"method": "a", "case": "1", "scores": {"background lpips": 0.1, "seconds": 2.0}},
        {"method": "a", "case": "2", "scores": {"background lpips": None, "seconds": 4.0}},
    ]
    lpips, seconds = summary.figures(rows, ("background lpips",), {"1": "a", "2": "b"})
    assert (lpips.count, lpips.mean, lpips.unit) == (1, 100.0, "x10^3")
    assert (seconds.count, seconds.median) == (2, 3.0)


def test_scales_are_those_of_the_node() -> None:
    tree = ast.parse((PACK / "nodes/host/scoring.py").read_text("utf-8"))
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_scales"
    )
    assert len(found) > 4
    assert {name: summary.published[name] for name in found} == found
