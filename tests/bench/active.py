"""What edits cost and are worth when only the tokens inside the mask are calculated.

    python tests/bench/active.py --count 200 --seed 1 --cache active_edits.json \\
        --json tests/bench/results/active.json

Seconds are of a Flux transformer with random weights, 512 channels and 2 + 4 blocks, and one text
token for eight of the picture as in Flux.1 at 1024 x 1024; 12 steps, the fastest of three each,
taken in turn. A first edit is of a picture that the model has not seen, a second one another of the
same picture, whose source is remembered. Worth is measured on held-out portraits with the demo
model, one at a time, with FocusFlow's mask and FlowEdit's guidance for Flux.1; the cache keeps what
is measured, and an interrupted run goes on from it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import torch
from torch import Tensor

from bench import edits
from bench.lab import Kept, Lab, Row, arguments, mean_row, report
from bench.random_models import random_flux, random_latent, random_prompt
from portraits.judging import psnr

matplotlib.use("agg")
from matplotlib import pyplot

steps, repeats = 12, 3
refresh, halo = 6, 1
"""The Edit Sampler's defaults."""
kinds = ("plain, first", "plain, second", "active, first", "active, second")
areas = (0.1, 0.25, 0.5)
sides = (32, 48, 64, 96)
"""Of latents, whose tokens take two cells each."""
main_side = 64
columns = [
    "edit",
    "tokens",
    "area_percent",
    "seconds",
    "times_faster",
    "psnr_outside",
    "psnr_inside",
    "psnr_whole",
    "attribute_edited",
    "psnr_to_plain",
    "tokens_percent",
]


def square(side: int, area: float) -> Tensor:
    """A mask in the middle of a latent, nearest to an area in whole tokens."""
    edge = round(side / 2 * math.sqrt(area)) * 2
    start = (side - edge) // 4 * 2
    mask = torch.zeros(1, side, side)
    mask[:, start : start + edge, start : start + edge] = 1
    return mask


def timed(lab: Lab, model: Any, mask: Tensor, target: int, *, active: bool) -> float:
    """Seconds of one sampling."""
    side = mask.shape[-1]
    tokens = (side // 2) ** 2 // 8
    prompts = {
        "source": random_prompt(0, tokens, 768),
        "target": random_prompt(target, tokens, 768),
    }
    parts = lab.edit_parts(
        model,
        prompts,
        1,
        steps=steps,
        n_max=steps,
        mask=mask,
        guidance=edits.published_guidance,
        remember_source=True,
        active_tokens=active,
        refresh=refresh,
        halo=halo,
    )
    started = time.perf_counter()
    lab.run("SamplerCustomAdvanced", **parts, latent_image={"samples": random_latent(side)})
    return time.perf_counter() - started


def speeds(lab: Lab, model: Any, side: int, area: float) -> Iterator[Row]:
    """A row for each kind of edit."""
    mask = square(side, area)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for name, active in (("plain", False), ("active", True)):
            # Each clone has a memory of its own.
            fresh = model.clone()
            for target, turn in enumerate(("first", "second"), 1):
                seconds[f"{name}, {turn}"].append(timed(lab, fresh, mask, target, active=active))
    # What else the machine had to do makes some of them longer.
    fastest = {edit: min(found) for edit, found in seconds.items()}
    for edit, taken in fastest.items():
        row: Row = {"edit": edit, "tokens": (side // 2) ** 2, "seconds": taken}
        row["area_percent"] = 100 * float(mask.mean())
        yield row | {"times_faster": fastest[kinds[0]] / taken}


def calculated(lab: Lab, mask: Tensor) -> float:
    """The share of the demo model's tokens that are calculated."""
    pack, grid = lab.host.pack, [side // 2 for side in mask.shape[1:]]
    share = float(pack.kernels.tokens.touched(mask, grid, halo).float().mean())
    return share if share <= pack.nodes.host.active_tokens.largest_share else 1.0


settings: dict[str, dict[str, Any]] = {"plain": {}} | {
    f"active, refresh {every}": {
        "active_tokens": True,
        "refresh": every,
        "halo": halo,
        # Without it there is a refresh at every step.
        "remember_source": True,
    }
    for every in (1, refresh)
}
"""What is other than in a plain edit."""


def judged(lab: Lab, case: edits.Case) -> Row:
    """Figures of one held-out edit, "setting: figure" -> number."""
    mask, _ = edits.velocity_masks(lab, lab.model, case)
    found: dict[str, Tensor] = {}
    made = {
        name: edits.flow_edit(lab, lab.model, case, "FocusFlow", mask, **widgets)
        for name, widgets in settings.items()
    }
    for name, edited in made.items():
        figures = edits.scores(case, edited, None)
        if name != "plain":
            figures["psnr_to_plain"] = psnr(edited, made["plain"])
            figures["tokens_percent"] = torch.tensor(100 * calculated(lab, mask))
        found |= {f"{name}: {figure}": value for figure, value in figures.items()}
    return {name: float(value) for name, value in found.items()}


def worth(lab: Lab, options: Any) -> list[Row]:
    """A row for each setting: means over the edits; what the cache holds is not made again."""
    kept = Kept(options.cache)
    rows = [
        kept.row(f"{options.seed} {number}", judged, lab, case)
        for number, case in enumerate(
            edits.cases(lab, "held-out", options.seed, options.count, batch=1)
        )
    ]
    mean = mean_row("", rows)
    return [
        {"edit": name, "tokens": 64}
        | {key.removeprefix(f"{name}: "): n for key, n in mean.items() if key.startswith(name)}
        for name in settings
    ]


def draw(rows: list[Row], target: Path) -> None:
    """Seconds against edited area, and against image tokens."""
    figure, (by_area, by_tokens) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    smallest = min(row["area_percent"] for row in rows if row["tokens"] == (main_side // 2) ** 2)
    for edit in kinds:
        chosen = [row for row in rows if row["edit"] == edit]
        here = [row for row in chosen if row["tokens"] == (main_side // 2) ** 2]
        _line(by_area, here, "area_percent", edit)
        _line(by_tokens, [r for r in chosen if r["area_percent"] < smallest + 2], "tokens", edit)
    by_area.set(xlabel="edited area, %", ylabel="seconds", ylim=(0, None), xlim=(0, None))
    by_tokens.set(xlabel="image tokens, about 10 % edited", ylim=(0, None), xlim=(0, None))
    by_area.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def _line(axes: Any, rows: list[Row], along: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row[along])
    axes.plot([r[along] for r in rows], [r["seconds"] for r in rows], marker="o", label=label)


def main() -> None:
    """Time, judge, draw and report."""
    options = arguments(__doc__, 200, cached=True)
    lab, model = Lab(), random_flux(512, 2, 4)
    pairs = [(main_side, area) for area in areas]
    pairs += [(side, areas[0]) for side in sides if side != main_side]
    rows: list[Row] = []
    for side, area in pairs:
        for row in speeds(lab, model, side, area):
            rows.append(row)
            print(row, flush=True)
    rows += worth(lab, options)
    if options.json:
        draw([row for row in rows if "seconds" in row], options.json.with_suffix(".png"))
    notes = (
        f"refresh {refresh}, halo {halo}. times_faster: than the plain first edit. PSNR in dB as "
        "in the edits bench; psnr_to_plain: to the pictures of the plain edit, at most 60; "
        "tokens_percent: of the target's tokens, how many are calculated, which is all where the "
        "mask takes over 80 % of them. ![seconds](active.png)"
    )
    report(rows, columns, options.json, notes)


if __name__ == "__main__":
    main()
