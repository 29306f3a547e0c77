"""Flux-Sculptor against its baselines on held-out portraits, with the Flux-format demo model.

    python tests/bench/sculptor.py --count 200 --seed 1 --json tests/bench/results/sculptor.json

All rows run on the same weights, latents and prompts in one process. Rows that invert share steps
and guidance; what else is set in them, the baselines' too, was chosen on another split
(`tests/bench/sculptor_sweep.py`). FlowEdit and FocusFlow run as in `tests/bench/edits.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from bench import edits, locators
from bench.edits import Case, Method
from bench.lab import Lab, Row, arguments, report
from bench.portrait_scores import identity_kept
from portraits.judging import outside, psnr, ssim

steps, guidance = 15, 2.0
solver = "RF-Solver"
columns = [
    "method",
    "attribute_edited",
    "attributes_kept",
    "identity_kept",
    "psnr_outside",
    "ssim_outside",
    "psnr_inside",
    "psnr_whole",
    "mask_iou",
    "mask_iou_cells",
    "model_calls",
    "seconds",
]


@dataclass(frozen=True)
class Recipe:
    """Settings of an edit through inversion; the masks come from a locator.

    Attributes:
        method: the solver, both ways.
        structure: part of the steps in which latents are fused; None for a plain Flow Solver.
        detail: parts of the steps between which attention values are fused; None for never.
        tokens: whose values.
        blocks: of the fusion.
        guidance: of the target prompt.
    """

    method: str = solver
    structure: float | None = None
    detail: tuple[float, float] | None = None
    tokens: str = "image"
    blocks: str = "67%-100%"
    guidance: float = guidance


def inverted_edit(
    lab: Lab, model: Any, case: Case, mask: Tensor | None, recipe: Recipe, **solving: Any
) -> Tensor:
    """Invert, then sample the target with what the recipe fuses; decoded."""
    (sigmas,) = lab.run("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    fused = recipe.detail and {
        "blocks": recipe.blocks,
        "start": recipe.detail[0],
        "end": recipe.detail[1],
    }
    recording = model
    if fused:
        (recording,) = lab.run(
            "PinpointRecordValues", model=model, **fused, **recorded(recipe.tokens)
        )
    noise, _, trajectory, _ = lab.run(
        "PinpointInvert",
        model=recording,
        source=case.prompts["source"],
        latent=case.latent,
        sigmas=sigmas,
        method=recipe.method,
        guidance=1.0,
        gamma=solving.get("gamma", 0.5),
        seed=case.seed,
        measure_round_trip=False,
    )
    editing = model
    if fused:
        (editing,) = lab.run(
            "PinpointInjectValues",
            model=model,
            **fused,
            strength=1.0,
            trend="constant",
            trajectory=trajectory,
            mask=mask,
        )
    if recipe.structure is None:
        (sampler,) = lab.run("PinpointFlowSolver", method=recipe.method, **flow_widgets(**solving))
    else:
        (sampler,) = lab.run(
            "PinpointStructureSampler",
            trajectory=trajectory,
            mask=mask,
            method=recipe.method,
            start=0.0,
            end=recipe.structure,
            strength=1.0,
            trend="constant",
            anchor=True,
        )
    return sampled(lab, editing, case, noise, sampler, sigmas, recipe.guidance)


def recorded(tokens: str) -> dict[str, Any]:
    """Record Values' widgets beside blocks and steps."""
    return {"tokens": tokens, "precision": "fp16", "device": "CPU", "limit_gb": 8.0}


def flow_widgets(gamma: float = 0.5, eta: float = 0.9, eta_end: float = 0.35) -> dict[str, Any]:
    """Flow Solver's widgets beside the method."""
    widgets = {"gamma": gamma, "eta": eta, "eta_start": 0.0, "eta_end": eta_end}
    return {**widgets, "eta_trend": "constant"}


def sampled(
    lab: Lab, model: Any, case: Case, noise: Any, sampler: Any, sigmas: Tensor, scale: float
) -> Tensor:
    """The target prompt sampled from inverted noise, decoded."""
    (guider,) = lab.run(
        "PinpointSourceTargetGuider",
        model=model,
        **case.prompts,
        source_guidance=1.0,
        target_guidance=scale,
        guidance_mode="auto",
        remember_source=False,
    )
    return lab.sampled(noise, guider, sampler, sigmas, case.latent)


plain = Recipe()
rf_inversion = Recipe("RF-Inversion")
rf_edit = Recipe(detail=(0.0, 0.2), tokens="image and text")
fire_edit = Recipe("FireFlow", detail=(0.0, 0.2), tokens="image and text")
sculptor = Recipe(structure=1.0, detail=(0.0, 0.2))

Locator = Callable[[Lab, Any, Case], tuple[Tensor, Tensor | None]]


def methods() -> dict[str, Method]:
    """Name -> edited pictures and, where the method found one, its mask."""

    def whole(recipe: Recipe, **solving: float) -> Method:
        return lambda lab, model, case: (
            inverted_edit(lab, model, case, None, recipe, **solving),
            None,
        )

    def local(recipe: Recipe, locate: Locator) -> Method:
        def run(lab: Lab, model: Any, case: Case) -> tuple[Tensor, Tensor | None]:
            soft, hard = locate(lab, model, case)
            return inverted_edit(lab, model, case, soft, recipe), hard

        return run

    def flow(method: str, locate: Locator | None) -> Method:
        def run(lab: Lab, model: Any, case: Case) -> tuple[Tensor, Tensor | None]:
            soft, hard = (None, None) if locate is None else locate(lab, model, case)
            scales = (1.0, guidance)
            return edits.flow_edit(lab, model, case, method, soft, scales), hard

        return run

    attention = locators.attention_masks
    ablated = {
        "no latent fusion": replace(sculptor, structure=None),
        "no value fusion": replace(sculptor, detail=None),
    }
    return {
        "plain target from inverted noise": whole(plain),
        "RF-Inversion": whole(rf_inversion, eta=0.7, eta_end=0.35),
        "RF-Solver-Edit": whole(rf_edit),
        "FireFlow-Edit": whole(fire_edit),
        "FlowEdit": flow("FlowEdit", None),
        "FocusFlow (velocity mask)": flow("FocusFlow", locators.velocity_masks),
        "FocusFlow (attention mask)": flow("FocusFlow", attention),
        "Flux-Sculptor (attention mask)": local(sculptor, attention),
        "Flux-Sculptor (velocity mask)": local(sculptor, locators.velocity_masks),
        "Flux-Sculptor (true mask)": local(sculptor, locators.true_masks),
        **{f"Flux-Sculptor, {name}": local(recipe, attention) for name, recipe in ablated.items()},
    }


def scores(case: Case, edited: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """The paper's columns, defined for portraits; one number for each edit of a batch."""
    away = outside(case.truth)
    asked, kept = case.panel.verdicts(edited)
    figures = {
        "attribute_edited": 100 * asked,
        "attributes_kept": 100 * kept,
        "identity_kept": 100 * identity_kept(case.edits, edited),
        "psnr_outside": psnr(edited, case.decoded, away),
        "ssim_outside": ssim(edited, case.decoded, away),
        "psnr_inside": psnr(edited, case.target, case.truth),
        "psnr_whole": psnr(edited, case.target),
    }
    if mask is not None:
        figures["mask_iou"] = locators.overlap(mask, case.truth, locators.token)
        figures["mask_iou_cells"] = locators.overlap(mask, case.truth, locators.cell)
    return figures


def bounds() -> dict[str, Method]:
    """What the judges say of the true edit and of the untouched source, both through the codec."""
    return {
        "the true edit": lambda lab, _model, case: (lab.decode(lab.encode(case.target)), None),
        "the source, unedited": lambda _lab, _model, case: (case.decoded, None),
    }


def round_trips(lab: Lab, case: Case) -> list[Row]:
    """How well each solver reconstructs at the bench's steps."""
    (sigmas,) = lab.run(
        "BasicScheduler", model=lab.model, scheduler="simple", steps=steps, denoise=1.0
    )
    rows = []
    for method in ("Euler", "FireFlow", "RF-Solver"):
        noise, *_ = lab.run(
            "PinpointInvert",
            model=lab.model,
            source=case.prompts["source"],
            latent=case.latent,
            sigmas=sigmas,
            method=method,
            guidance=1.0,
            gamma=0.5,
            seed=0,
            measure_round_trip=False,
        )
        (sampler,) = lab.run("PinpointFlowSolver", method=method, **flow_widgets())
        prompts = {**case.prompts, "target": case.prompts["source"]}
        back = replace(case, prompts=prompts)
        image = sampled(lab, lab.model, back, noise, sampler, sigmas, 1.0)
        rows.append(
            {
                "method": f"reconstruction by {method}",
                "psnr_whole": float(psnr(image, case.decoded).mean()),
            }
        )
    return rows


def main() -> None:
    """Run every method on the same cases and report."""
    options = arguments(__doc__, 200)
    lab = Lab("flux")
    all_cases = list(edits.cases(lab, "held-out", options.seed, options.count))
    found, (node, _) = (
        locators.attention_masks(lab, lab.model, all_cases[0])[0],
        (locators.node_masks(lab, all_cases[0], 0)),
    )
    torch.testing.assert_close(found[:1], node, atol=1e-3, rtol=0)
    rows = round_trips(lab, all_cases[0])
    print(rows, flush=True)
    for name, method in {**methods(), **bounds()}.items():
        rows += edits.measured(lab, name, method, all_cases, scores)
    notes = (
        "attribute_edited: percent of edits whose attribute is nearest to the one asked for "
        "(AttrEdit). attributes_kept: percent of the other attributes that can be seen and are "
        "still the source's (AttrPreserve). identity_kept: 100 minus the mean error of the "
        "identity's 14 parameters as fitted to the picture, in percent of their ranges (ID). PSNR "
        "in dB, each capped at 60, and SSIM; outside: beyond 8 px of the true mask, against the "
        "source as the codec decodes it, before compositing; inside and whole: against the true "
        "edit. mask_iou: the located region, before it is grown for the edit, against the true "
        "one, both on the 8 x 8 grid of image tokens; mask_iou_cells: on the 16 x 16 latent cells "
        f"(a square is in when the mask holds {locators.least_share:.0%} of it); attention knows "
        "tokens only. seconds: one edit in a batch, judging included. The reconstructions are of "
        f"the first {edits.batch} cases. The last two rows bound what can be reached."
    )
    report(rows, columns, options.json, notes)


if __name__ == "__main__":
    main()
