"""Means, medians and bootstrap confidence intervals of a run's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .store import Row

published = {
    "structure distance": (1e3, "x10^3"),
    "lpips": (1e3, "x10^3"),
    "mse": (1e4, "x10^4"),
    "ssim": (1e2, "x10^2"),
    "psnr": (1.0, "dB"),
    "clip whole": (1e2, "x10^2"),
    "clip inside": (1e2, "x10^2"),
    "attribute edited": (1e2, "%"),
    "attributes kept": (1e2, "%"),
    "seconds": (1.0, "s"),
}
"""Score, or the last word of its name -> what it is multiplied by where papers print it."""
resamples, confidence = 2000, 0.95


@dataclass(frozen=True)
class Figure:
    """A score of a method over the cases in which it is defined, as papers scale it.

    Attributes:
        low, high: of the median's confidence interval (percentile bootstrap).
    """

    method: str
    score: str
    unit: str
    count: int
    mean: float
    median: float
    low: float
    high: float


def figures(rows: Iterable[Row], scores: Sequence[str]) -> list[Figure]:
    """Every method's figures, in the order of the scores; rows with errors count nowhere."""
    good = [row for row in rows if not row.get("error")]
    methods = list(dict.fromkeys(row["method"] for row in good))
    found = []
    for score in (*scores, "seconds"):
        factor, unit = scale(score)
        for method in methods:
            own = [row["scores"].get(score) for row in good if row["method"] == method]
            values = np.array([value * factor for value in own if value is not None])
            if len(values):
                low, high = interval(values)
                middle = float(np.median(values))
                mean = float(values.mean())
                found.append(Figure(method, score, unit, len(values), mean, middle, low, high))
    return found


def scale(score: str) -> tuple[float, str]:
    """What a score is multiplied by, and the unit it is then in."""
    return published.get(score) or published.get(score.split()[-1], (1.0, ""))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The confidence interval of a median; a point where all values are the same."""
    if len(np.unique(values)) == 1:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.median,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def table(found: Sequence[Figure]) -> str:
    """A Markdown table."""
    lines = [
        "| score | method | cases | mean | median | 95 % of the median |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        numbers = (f"{value:.4g}" for value in (one.mean, one.median))
        cells = [f"{one.score} {one.unit}".rstrip(), one.method, str(one.count), *numbers]
        lines.append("| " + " | ".join([*cells, f"{one.low:.4g} to {one.high:.4g}"]) + " |")
    return "\n".join(lines)


def errors(rows: Iterable[Row]) -> dict[str, int]:
    """How many cases of each method ended in an error."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["method"]] = counts.get(row["method"], 0) + bool(row.get("error"))
    return counts
