"""Means, medians and bootstrap confidence intervals of a run's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .cases import Protocol
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
fewest_clusters = 5
"""Of fewer, resampling says nothing of how far a median is off."""


@dataclass(frozen=True)
class Figure:
    """A score of a method over the cases in which it is defined, as papers scale it.

    Attributes:
        low, high: of the median's confidence interval; None where there are too few pictures.
    """

    method: str
    score: str
    unit: str
    count: int
    mean: float
    median: float
    low: float | None
    high: float | None

    @property
    def spread(self) -> str:
        """The interval for people."""
        return "" if self.low is None else f"{self.low:.4g} to {self.high:.4g}"


def shared(rows: Iterable[Row]) -> list[Row]:
    """The rows of the cases that every method has made and no error befell, for a fair comparison.

    A method that has made none is left out.
    """
    made: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "scores" in row and not row.get("error"):
            made.setdefault(row["method"], {})[row["case"]] = row
    common = set.intersection(*map(set, made.values())) if made else set()
    return [row for own in made.values() for case, row in own.items() if case in common]


def figures(
    rows: Sequence[Row], scores: Sequence[str], clusters: Mapping[str, str]
) -> list[Figure]:
    """Every method's figures, in the order of the scores.

    Args:
        rows: with scores.
        clusters: case -> what it shares with others, so that they are not independent.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = []
    for score in (*scores, "seconds"):
        factor, unit = scale(score)
        for method in methods:
            own = {
                row["case"]: value * factor
                for row in rows
                if row["method"] == method and (value := row["scores"].get(score)) is not None
            }
            if own:
                values = np.array([*own.values()])
                low, high = interval(values, [clusters[case] for case in own])
                middle = float(np.median(values))
                mean = float(values.mean())
                found.append(Figure(method, score, unit, len(values), mean, middle, low, high))
    return found


def scale(score: str) -> tuple[float, str]:
    """What a score is multiplied by, and the unit it is then in."""
    return published.get(score) or published.get(score.split()[-1], (1.0, ""))


def interval(
    values: np.ndarray, clusters: Sequence[str]
) -> tuple[float, float] | tuple[None, None]:
    """The confidence interval of a median: percentile bootstrap over whole clusters of values.

    Undefined (None) for fewer than `fewest_clusters`.
    """
    order = np.argsort(values)
    names, of_value = np.unique(np.asarray(clusters)[order], return_inverse=True)
    count = len(names)
    if count < fewest_clusters:
        return None, None
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    # How many values there are up to each, in order, in each sample: two of them are the middle.
    ranks = drawn[:, of_value].cumsum(1)
    total = ranks[:, -1:]
    middle = [(ranks > place).argmax(1) for place in ((total - 1) // 2, total // 2)]
    medians = values[order][np.stack(middle)].mean(0)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def table(found: Sequence[Figure]) -> str:
    """A Markdown table."""
    lines = [
        "| score | method | cases | mean | median | 95 % of the median |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        numbers = (f"{value:.4g}" for value in (one.mean, one.median))
        cells = [f"{one.score} {one.unit}".rstrip(), one.method, str(one.count), *numbers]
        lines.append("| " + " | ".join([*cells, one.spread]) + " |")
    return "\n".join(lines)


def errors(rows: Iterable[Row]) -> dict[str, int]:
    """How many cases of each method ended in an error."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["method"]] = counts.get(row["method"], 0) + bool(row.get("error"))
    return counts


def not_measured(
    protocol: Protocol, found: Sequence[Figure], judges: Mapping[str, str]
) -> list[str]:
    """Of each of the protocol's scores without a figure, a sentence that says what it takes.

    Args:
        judges: those that were asked, by their options' names; "" was not.
    """
    measured = {one.score for one in found}
    return [
        f"not measured: {score} ({_needed(score, protocol.lpips, judges)})"
        for score in protocol.scores
        if measured and score not in measured
    ]


def _needed(score: str, net: str, judges: Mapping[str, str]) -> str:
    names = _judged_by.get(score.split()[-1]) or _judged_by.get(score.split()[0], ())
    options = [f"--{name.replace('_', '-')}" for name in names if not judges[name]]
    if not options:
        return "no case has what it takes, such as a mask"
    published_net = f" {net}, the published network" if options == ["--lpips"] else ""
    return f"give {' and '.join(options)}{published_net}"


_both_towers = ("clip", "clip_vision")
_judged_by = {
    "lpips": ("lpips",),
    "clip": _both_towers,
    "clip-i": ("clip_vision",),
    "attribute": _both_towers,
    "attributes": _both_towers,
    "structure": ("dino",),
    "dino-i": ("dino",),
    "identity": ("identity",),
}
"""The last or the first word of a score -> the judges that it takes."""
