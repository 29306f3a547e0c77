"""One dial between keeping a subject and following the prompt: FlexIP over gamma.

    python tests/portraits/train_flexip.py --gate none --output single.safetensors
    python tests/portraits/train_flexip.py --gate linear --output linear.safetensors
    python tests/bench/flexip.py --count 60 --seed 1 --single single.safetensors \\
        --linear linear.safetensors --json tests/bench/results/flexip.json

Each held-out person has one reference, a portrait with other attributes than the four prompts ask
for; all rows generate from the same noises on the same model. Each row's adapter is trained for it,
on the same pairs and with the same steps; the literal gate's is the one that ships. A finished row
of a person is kept in `--cache`, from which an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clock import Clock
from bench.lab import Kept, Lab, Row, mean_row, parser, report
from portraits import weights
from portraits.dataset import people, pictures, smallest_change, views
from portraits.judging import fitted_identities, nearest_values, visible
from portraits.people import Portrait, attributes, caption, identity_ranges

matplotlib.use("agg")
from matplotlib import pyplot

gammas = (0.0, 0.25, 0.5, 0.75, 1.0)
prompts_each, steps, guidance = 4, 12, 2.0
judged_size, fitting_steps = 64, 40
# Where a person is in the picture is no part of who it is; half of the people have no mole.
judged_identity = [n for n in identity_ranges if not n.startswith(("center", "mole"))]
figures = ("preservation", "personalization")
columns = ["method", "gamma", *figures]


@dataclass(frozen=True)
class Method:
    """A row: an adapter's file (None for no adapter), and how the dial turns it.

    The weight is that of rows whose dial is gamma.
    """

    file: str | None
    mode: str
    dial: str
    weight: float = 1.0


methods = {
    "no adapter": Method(None, "literal", "gamma"),
    "single adapter, weight": Method("single", "linear", "weight"),
    "FlexIP, literal gate": Method("flexip", "literal", "gamma"),
    "FlexIP, linear gate": Method("linear", "linear", "gamma"),
}


Findings = dict[tuple[str, float], list[Row]]
"""By method and place of the dial: a row for each person."""


class Studio:
    """The demo model with its image encoders and adapters.

    Args:
        lab: with the SD3-format model.
        adapters: files beside the shipped adapter, by name.
    """

    def __init__(self, lab: Lab, **adapters: Path):
        self.lab = lab
        host = f"{self.lab.host.pack.__name__}.nodes.host"
        files, self.adapting, self.gates = (
            importlib.import_module(f"{host}.{name}")
            for name in ("adapter_files", "adapting", "gates")
        )
        chosen = {"flexip": weights.flexip_file, **adapters}
        self.adapters = {name: files.load_file(file) for name, file in chosen.items()}
        shared = weights.network_files["sd3"], weights.low_encoder_file, weights.high_encoder_file
        self._shared = " ".join(map(_digest, shared))
        self._digests = {name: _digest(file) for name, file in chosen.items()}
        self.encoders = [
            self.lab.run("PinpointLoadImageEncoder", file_name=file.name, activation="auto")[0]
            for file in (weights.low_encoder_file, weights.high_encoder_file)
        ]

    def digest(self, method: Method) -> str:
        """Differs where a method's pictures do, for rows that are kept."""
        own = self._digests.get(method.file or "", "")
        return f"{steps} {guidance} {judged_size} {fitting_steps} {self._shared} {own}"

    def subject(self, person: Portrait) -> Any:
        """A person's portrait as the encoders see it."""
        low, high = self.encoders
        image = pictures([person]).movedim(1, -1).float() / 255
        given = {"image": image, "low_encoder": low, "high_encoder": high}
        widgets = self.lab.defaults("PinpointEncodeSubject")
        return self.lab.run("PinpointEncodeSubject", **widgets, **given)[0]

    def model(self, method: Method, subject: Any, dial: float) -> Any:
        """The model with an adapter at one place of its dial."""
        if method.file is None:
            return self.lab.model
        weight, gamma = (dial, 1.0) if method.dial == "weight" else (method.weight, dial)
        settings = self.adapting.Settings(weight, self.gates.constant(gamma), method.mode)
        return self.adapting.applied(self.lab.model, self.adapters[method.file], subject, settings)

    def pictures(self, model: Any, texts: list[str], seed: int) -> tuple[Tensor, float]:
        """(B, 3, 128, 128) from noise, and the seconds that the sampling took."""
        prompts = {"positive": self.lab.prompts(texts), "negative": self.lab.prompts([""])}
        started = time.perf_counter()
        (made,) = self.lab.run(
            "KSampler",
            model=model,
            seed=seed,
            steps=steps,
            cfg=guidance,
            sampler_name="euler",
            scheduler="simple",
            latent_image={"samples": torch.zeros(len(texts), 16, 16, 16)},
            **prompts,
        )
        seconds = time.perf_counter() - started
        return self.lab.decode(made), seconds


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


@dataclass(frozen=True)
class Case:
    """One person, as the reference shows them and as the prompts ask for them."""

    number: int
    person: Portrait

    @cached_property
    def views(self) -> list[Portrait]:
        """The reference, and what is asked for."""
        return views(self.person, random.Random(f"flexip:{self.number}"), 1 + prompts_each)

    @property
    def asked(self) -> list[Portrait]:
        """What is asked for."""
        return self.views[1:]

    @cached_property
    def seen(self) -> dict[str, list[bool]]:
        """Which attributes can be seen in what is asked for; hair under a hat cannot."""
        return {name: visible(self.asked, name, smallest_change) for name in attributes}


def scores(case: Case, images: Tensor) -> Row:
    """How well identity and visible attributes are found in pictures of a person, in percent."""
    images = F.interpolate(images, (judged_size, judged_size), mode="area")
    fitted = fitted_identities(images, case.asked, fitting_steps, moles=(0.05,))
    shown, hits = list(case.asked), []
    for name in attributes:
        for number, value in enumerate(nearest_values(images, fitted, name)):
            if case.seen[name][number]:
                hits.append(value == case.asked[number].attributes[name])
                shown[number] = shown[number].having(name, value)
    # What did not come as asked for would be fitted as if it were a part of the face.
    for number, person in enumerate(shown):
        if person != case.asked[number]:
            alone = images[number : number + 1]
            (fitted[number],) = fitted_identities(alone, [person], fitting_steps, moles=(0.05,))
    return {
        "preservation": 100 * (1 - statistics.mean(_error(case.person, f) for f in fitted)),
        "personalization": 100 * statistics.mean(hits),
    }


def _error(person: Portrait, fitted: Portrait) -> float:
    """Of an identity, in shares of the ranges."""
    errors = []
    for (name, (low, high)), wanted, found in zip(
        identity_ranges.items(), person.identity, fitted.identity, strict=True
    ):
        if name in judged_identity:
            errors.append(abs(found - wanted) / (high - low))
    return statistics.mean(errors)


def measured(studio: Studio, case: Case, name: str, dial: float) -> Row:
    """One person's pictures by one method at one place of its dial, judged."""
    model = studio.model(methods[name], studio.subject(case.views[0]), dial)
    images, _ = studio.pictures(model, [caption(p) for p in case.asked], case.number)
    return scores(case, images)


def run(studio: Studio, options: argparse.Namespace) -> Findings:
    """Each row of all people; what the cache holds is not made again."""
    kept = Kept(options.cache)
    found: Findings = {}
    cases = [Case(*each) for each in enumerate(people("held-out", options.seed, options.count))]
    for case in reversed(cases) if options.backwards else cases:
        for name, method in methods.items():
            for dial in gammas if method.file else gammas[:1]:
                key = f"{options.seed} {case.number} {name} {dial} {studio.digest(method)}"
                row = kept.row(key, measured, studio, case, name, dial)
                found.setdefault((name, dial), []).append(row)
    return found


def means(found: Findings) -> list[Row]:
    """The mean of each row over all people."""
    return [{"gamma": dial, **mean_row(name, rows)} for (name, dial), rows in found.items()]


def verdict(found: Findings) -> str:
    """What the curves do: monotony, largest jump, and the frontier against the single adapter's."""
    lines = [
        f"{name}: {_course(found, name, figure, sign)}"
        for name, method in methods.items()
        if method.file
        for figure, sign in zip(figures, (1, -1), strict=True)
    ]
    rows = means(found)
    single = [row for row in rows if row["method"] == "single adapter, weight"]
    for name, method in methods.items():
        if method.dial == "gamma" and method.file:
            places = Counter(_place(point, single) for point in rows if point["method"] == name)
            lines.append(
                f"{name}: of {len(gammas)} points {places['above']} lie above the single adapter's "
                f"curve, {places['beyond']} preserve more than it ever does, {places['below']} lie "
                "below."
            )
    return "\n".join(lines)


def _course(found: Findings, name: str, figure: str, sign: int) -> str:
    """How a figure goes with the dial, up or down by its sign; steps are of the same people."""
    columns = [[sign * row[figure] for row in found[name, dial]] for dial in gammas]
    changes = [
        [b - a for a, b in zip(before, after, strict=True)] for before, after in pairwise(columns)
    ]
    steps = [statistics.mean(each) for each in changes]
    errors = [statistics.pstdev(each) / len(each) ** 0.5 for each in changes]
    certain = sum(step < -2 * error for step, error in zip(steps, errors, strict=True))
    correlation = sign * _rank_correlation([statistics.mean(column) for column in columns])
    chance, everyone = random.Random(0), range(len(columns[0]))
    jumps = sorted(_jump(changes, chance.choices(everyone, k=len(everyone))) for _ in range(1000))
    return (
        f"{figure}'s rank correlation with the dial is {correlation:.2f}; of {len(steps)} steps "
        f"{sum(step < 0 for step in steps)} go the other way, {certain} by more than twice their "
        f"standard error; the largest is {_jump(changes, everyone):.1f} times the mean (90 % of "
        f"bootstraps: {jumps[50]:.1f} to {jumps[949]:.1f})."
    )


def _jump(changes: list[list[float]], chosen: Sequence[int]) -> float:
    """The largest step of some people's mean, in mean steps."""
    steps = [abs(statistics.mean(each[n] for n in chosen)) for each in changes]
    return max(steps) / max(statistics.mean(steps), 1e-9)


def _rank_correlation(values: list[float]) -> float:
    ranks = [sorted(values).index(value) for value in values]
    return statistics.correlation(range(len(ranks)), ranks)


def _place(point: Row, curve: list[Row]) -> str:
    """Where a point lies: by the personalization that a curve has at the same preservation."""
    ends = sorted((row["preservation"], row["personalization"]) for row in curve)
    x, y = point["preservation"], point["personalization"]
    if x > ends[-1][0]:
        return "beyond"
    # The curve's point that preserves least also does for those that ask for less.
    wanted = ends[0][1]
    for (x0, y0), (x1, y1) in pairwise(ends):
        if x0 <= x <= x1:
            wanted = y0 + (y1 - y0) * (x - x0) / max(1e-9, x1 - x0)
    return "above" if y > wanted else "below"


def draw(rows: list[Row], target: Path) -> None:
    """Both figures over the dial, and one against the other."""
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4))
    for number, name in enumerate(methods):
        curve = [row for row in rows if row["method"] == name]
        points = {f: [row[f] for row in curve] for f in ("gamma", *figures)}
        style: dict[str, Any] = {"marker": "o", "label": name, "color": f"C{number}"}
        if len(curve) > 1:
            for axis, over in zip(axes, figures, strict=False):
                axis.plot(points["gamma"], points[over], **style)
        axes[2].plot(points[figures[0]], points[figures[1]], **style)
    for axis, over in zip(axes, figures, strict=False):
        axis.set_xlabel("gamma, or the single adapter's weight")
        axis.set_ylabel(f"{over}, %")
    axes[2].set_xlabel(f"{figures[0]}, %")
    axes[2].set_ylabel(f"{figures[1]}, %")
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def overhead(studio: Studio) -> str:
    """What the adapter adds to sampling, measured in turn with runs without it."""
    person, *asked = views(people("held-out", 2, 1)[0], random.Random(0), 1 + prompts_each)
    subject = studio.subject(person)
    texts, runs = [caption(p) for p in asked], 30
    adapted = studio.model(methods["FlexIP, literal gate"], subject, 0.5)
    clocks = {"plain": Clock(studio.lab.model), "adapted": Clock(adapted)}
    taken: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(runs):
        for name, clock in clocks.items():
            taken[name].append(studio.pictures(clock.model, texts, 0)[1])
    step = {name: statistics.median(clock.steps) for name, clock in clocks.items()}
    whole = {name: statistics.median(seconds) for name, seconds in taken.items()}
    once = whole["adapted"] - whole["plain"] - steps * (step["adapted"] - step["plain"])
    of_step, of_run = (100 * (each["adapted"] / each["plain"] - 1) for each in (step, whole))
    return (
        f"Overhead: {of_step:.1f} % of a step (medians of {len(clocks['plain'].steps)}, each run's "
        f"first left out) and {1000 * once:.0f} ms once for each run; of runs of {steps} steps "
        f"{of_run:.1f} % in all (the sampling alone, {len(texts)} pictures with guidance). "
        + memory(studio)
    )


def memory(studio: Studio) -> str:
    """What the adapter takes of it."""
    network = studio.adapters["flexip"].patcher.model
    size, sizes = sum(p.nbytes for p in network.parameters()), network.sizes
    tokens = sizes.detail_tokens + sizes.global_tokens + len(studio.lab.tokens(""))
    # Keys and values in fp32, in every block.
    kept = 2 * 4 * tokens * sum(sizes.blocks.values())
    return (
        f"The adapter's weights take {size / 1e6:.1f} MB, what is kept of a subject over the steps "
        f"{kept / 1e6:.2f} MB for each prompt."
    )


def main() -> None:
    """Run all rows on the same people and report."""
    given = parser(__doc__, 60, cached=True)
    given.add_argument(
        "--backwards", action="store_true", help="for a second process that shares the cache"
    )
    for name in ("single", "linear"):
        given.add_argument(f"--{name}", type=Path, required=True, help="that adapter's file")
    options = given.parse_args()
    studio = Studio(Lab("sd3"), single=options.single, linear=options.linear)
    found = run(studio, options)
    rows, texts = means(found), [notes, verdict(found), overhead(studio)]
    if options.json:
        picture = options.json.with_suffix(".png")
        texts.append(f"![both figures over the dial, and one against the other]({picture.name})")
    report(rows, columns, options.json, "\n\n".join(texts))
    if options.json:
        draw(rows, picture)


notes = (
    "Means over people and prompts, from noise. preservation: 100 minus the mean error of the "
    "identity's 12 parameters of the face, in percent of their ranges, as fitted to the picture "
    "with the attributes that it is found to show. personalization: percent of the visible "
    "attributes that are as prompted. The dial is gamma; for the single adapter (an IP-Adapter of "
    "detail and global tokens) its weight. Each adapter is trained with its own gate on the same "
    "pairs, after its preservation tokens were taught on the drawer's labels, see "
    "tests/portraits/train_flexip.py."
)


if __name__ == "__main__":
    main()
