"""Which settings serve each method of `sculptor.py` best? Measured on a split that is not judged.

    python tests/bench/sculptor_sweep.py --count 88 --seed 5 \\
        --json tests/bench/results/sculptor_sweep.json

The attention mask's threshold and growth, and for every kind of edit its own settings; the bench
uses the rows that a person would choose here: edited as asked first, then the whole picture's PSNR.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from bench import edits, locators, sculptor
from bench.edits import Case
from bench.lab import Lab, Row, arguments, report
from bench.sculptor import Recipe
from portraits.judging import outside, psnr

columns = [
    "setting",
    "attribute_edited",
    "attributes_kept",
    "psnr_outside",
    "psnr_inside",
    "psnr_whole",
    "mask_iou",
]


def recipes() -> Iterator[tuple[str, Recipe, dict[str, float]]]:
    """Settings of the edits, each with a name."""
    for scale in (1.0, 2.0, 3.0, 5.0):
        yield f"plain target, guidance {scale:g}", Recipe(guidance=scale), {}
    for eta in (0.5, 0.7, 0.9):
        for end in (0.2, 0.35):
            solving = {"eta": eta, "eta_end": end}
            yield f"RF-Inversion, eta {eta:g} to {end:g}", Recipe("RF-Inversion"), solving
    for end in (0.07, 0.14, 0.2, 0.34):
        recipe = replace(sculptor.rf_edit, detail=(0.0, end))
        yield f"RF-Solver-Edit, values to {end:g}", recipe, {}
    for structure in (0.5, 0.8, 1.0):
        for detail in (None, (0.0, 0.14), (0.5, 1.0), (0.8, 1.0)):
            named = "no values" if detail is None else f"values {detail[0]:g} to {detail[1]:g}"
            recipe = replace(sculptor.sculptor, structure=structure, detail=detail)
            yield f"sculptor, latents to {structure:g}, {named}", recipe, {}


def locating(lab: Lab, cases: list[Case]) -> Iterator[Row]:
    """The attention mask at several thresholds, from one gathering for each choice of blocks."""
    for blocks in ("25%-75%", "50%-75%", "25%-100%", "all"):
        for spread in (0, 1):
            settings = {"blocks": blocks, "propagation": spread}
            heats = [locators.attention_heats(lab, lab.model, case, **settings) for case in cases]
            for threshold in (0.15, 0.2, 0.25, 0.3, 0.4):
                scores = [
                    locators.overlap(
                        locators.shaped_masks(lab, case, heat, threshold=threshold, dilation=0)[1],
                        case.truth,
                        locators.token,
                    )
                    for case, heat in zip(cases, heats, strict=True)
                ]
                name = f"attention mask, {blocks}, spread {spread}, threshold {threshold:g}"
                yield {"setting": name, "mask_iou": float(torch.cat(scores).mean())}


def growing(lab: Lab, cases: list[Case]) -> Iterator[Row]:
    """Flux-Sculptor with attention masks of several thresholds, grown by several windows."""
    heats = [locators.attention_heats(lab, lab.model, case) for case in cases]
    for threshold in (0.2, 0.25, 0.3):
        for dilation in (3, 5, 7):
            masks = [
                locators.shaped_masks(lab, case, heat, threshold=threshold, dilation=dilation)[0]
                for case, heat in zip(cases, heats, strict=True)
            ]
            name = f"sculptor, attention mask, threshold {threshold:g}, dilation {dilation}"
            yield {"setting": name, **measured(lab, cases, masks, sculptor.sculptor, {})}


def true_masks(cases: list[Case], recipe: Recipe) -> list[Tensor | None]:
    """The exact masks, for recipes that use one."""
    return [None if recipe.structure is None else edits.cells(case.truth) for case in cases]


def measured(
    lab: Lab,
    cases: list[Case],
    masks: Sequence[Tensor | None],
    recipe: Recipe,
    solving: dict[str, float],
) -> Row:
    """The scores of a recipe with a mask for each case."""
    parts: dict[str, list[Tensor]] = {}
    for case, mask in zip(cases, masks, strict=True):
        edited = sculptor.inverted_edit(lab, lab.model, case, mask, recipe, **solving)
        asked, kept = case.panel.verdicts(edited)
        figures = {
            "attribute_edited": 100 * asked,
            "attributes_kept": 100 * kept,
            "psnr_outside": psnr(edited, case.decoded, outside(case.truth)),
            "psnr_inside": psnr(edited, case.target, case.truth),
            "psnr_whole": psnr(edited, case.target),
        }
        for name, values in figures.items():
            parts.setdefault(name, []).append(values)
    return {name: float(torch.cat(values).mean()) for name, values in parts.items()}


def main() -> None:
    """Sweep and report."""
    options = arguments(__doc__, 88)
    lab = Lab("flux")
    cases = list(edits.cases(lab, "dev", options.seed, options.count))
    rows: list[Row] = []
    for row in chain(growing(lab, cases), locating(lab, cases)):
        rows.append(row)
        print(row, flush=True)
    for name, recipe, solving in recipes():
        figures = measured(lab, cases, true_masks(cases, recipe), recipe, solving)
        rows.append({"setting": name, **figures})
        print(rows[-1], flush=True)
    report(rows, columns, options.json, "Edits with true masks unless another is named; split dev.")


if __name__ == "__main__":
    main()
