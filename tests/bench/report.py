"""Every method of the pack on the same held-out portraits: pictures, figures, cost, and failures.

    python tests/bench/report.py --json tests/bench/results/report.json

One edit of each attribute, one at a time. Settings are those of the demo workflows, and those of
`tests/bench/sculptor.py` and `null_text.py` for what goes through an inversion. Writes a JPEG
beside the JSON file. The figures of many portraits are in each method's own bench.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from bench import edits, flexip, identity, null_text, sculptor
from bench.edits import Case
from bench.lab import Lab, Row, arguments, mean_row, report, shallow_clip
from bench.portrait_scores import identity_kept
from portraits.judging import drawn_values, outside, psnr
from portraits.people import attributes, phrase

demo_guidance = (1.0, 2.0)
strength = 0.6
columns = [
    *("method", "edited", "others_kept", "identity_kept", "psnr_outside", "psnr_whole"),
    *("model_calls", "latents", "seconds", "fails"),
]
side, label_width, label_height, frame = 128, 132, 40, 4
red = (210, 30, 30)

Method = Callable[[Lab, Case], Tensor]


def methods() -> dict[str, tuple[str, Method]]:
    """Name -> the demo model that it edits with, and one edit."""
    inverting = {
        "RF-Inversion": "RF-Inversion",
        "RF-Solver-Edit": "RF-Solver-Edit",
        "FireFlow-Edit": "FireFlow-Edit",
        "Flux-Sculptor": "Flux-Sculptor (attention mask)",
    }
    return {
        "FocusFlow": ("sd3", focusflow),
        "FlowEdit": ("sd3", flowedit),
        f"SDEdit {strength}": ("sd3", sdedit),
        "S2Edit": ("sd3", learned_person),
        "FlexIP": ("sd3", kept_subject),
        **{name: ("flux", partial(inverted, method=row)) for name, row in inverting.items()},
        "Prompt-to-Prompt": ("sd15", prompt_to_prompt),
    }


def focusflow(lab: Lab, case: Case, model: Any = None) -> Tensor:
    """A mask from the velocities' difference, and an edit inside it."""
    model = model or lab.model
    soft, _ = edits.velocity_masks(lab, model, case)
    return edits.flow_edit(lab, model, case, "FocusFlow", soft, demo_guidance)


def flowedit(lab: Lab, case: Case) -> Tensor:
    """The edit without a mask."""
    return edits.flow_edit(lab, lab.model, case, "FlowEdit", None, demo_guidance)


def sdedit(lab: Lab, case: Case) -> Tensor:
    """The target prompt from a partly noised source."""
    return edits.sdedit(lab, lab.model, case, strength)[0]


def learned_person(lab: Lab, case: Case) -> Tensor:
    """FocusFlow with a word for the person, learned from the source."""
    (edit,) = case.edits
    mask = 1 - drawn_values([edit.source], "background")[1]
    source, target = map(identity.named, edit.prompts)
    widgets = {"prompt": source, "name": identity.name, "class_word": identity.class_word}
    learned, _ = identity.learn(lab, case.source, mask, widgets)
    model, clip = identity.applied(lab, lab.model, lab.clip, learned, mask)
    texts = {"source": source, "target": target}
    encoded = {
        name: lab.run("CLIPTextEncode", clip=clip, text=text)[0] for name, text in texts.items()
    }
    return focusflow(lab, replace(case, prompts={**case.prompts, **encoded}), model)


def kept_subject(lab: Lab, case: Case) -> Tensor:
    """FocusFlow with an adapter that looks at the source."""
    studio = _studio(lab)
    (gate,) = lab.run(
        "PinpointFlexIPGate",
        **{**lab.defaults("PinpointFlexIPGate"), "shape": "linear", "first": 0.2, "last": 0.6},
    )
    (model,) = lab.run(
        "PinpointApplyFlexIP",
        **lab.defaults("PinpointApplyFlexIP"),
        model=lab.model,
        adapter=studio.adapters["flexip"],
        subject=studio.subject(case.edits[0].source),
        gate=gate,
    )
    return focusflow(lab, case, model)


@cache
def _studio(lab: Lab) -> flexip.Studio:
    return flexip.Studio(lab)


def inverted(lab: Lab, case: Case, method: str) -> Tensor:
    """A method that runs the picture back to noise first."""
    return sculptor.methods()[method](lab, lab.model, case)[0]


def prompt_to_prompt(lab: Lab, case: Case) -> Tensor:
    """Null-text inversion, and the target prompt with the source's attention."""
    found = null_text.Inverted(lab, case.edits[0], inner_steps=10)
    return found.controlled(0.4, 0.6, blend=False)


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """The latents in each call of networks of a kind while this is open, also of copies."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module) is type(network):
            rows.append(len(args[0]))

    handle = register_module_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def measured(lab: Lab, case: Case, method: Method) -> tuple[Row, Tensor]:
    """One edit's figures, and its picture (3, H, W)."""
    started = time.perf_counter()
    with counted(lab.model.model.diffusion_model) as rows:
        picture = method(lab, case)
    seconds = time.perf_counter() - started
    row: Row = {"seconds": seconds, "model_calls": len(rows), "latents": sum(rows)}
    asked, kept = case.panel.verdicts(picture)
    row |= {
        "edited": 100 * float(asked),
        "others_kept": 100 * float(kept),
        "identity_kept": 100 * float(identity_kept(case.edits, picture)),
        "psnr_outside": float(psnr(picture, case.decoded, outside(case.truth))),
        "psnr_whole": float(psnr(picture, case.target)),
    }
    return row, picture[0]


def asked_for(case: Case) -> tuple[str, str]:
    """What an edit changes, in words, and into what."""
    (edit,) = case.edits
    return phrase(edit.attribute, edit.source), phrase(edit.attribute, edit.target)


@dataclass(frozen=True)
class Strip:
    """A method's pictures of all cases; those in which the edit did not come are framed."""

    name: str
    pictures: list[Tensor]
    framed: list[bool]


def sheet(cases: list[Case], strips: list[Strip]) -> Image.Image:
    """A row for each method and a column for each edit."""
    size = (label_width + len(cases) * side, label_height + len(strips) * side)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for column, case in enumerate(cases):
        before, after = asked_for(case)
        left = label_width + column * side + 4
        draw.text((left, 4), before, "gray", font)
        draw.text((left, 20), f"to {after}", "black", font)
    for index, strip in enumerate(strips):
        top = label_height + index * side
        draw.text((6, top + side // 2 - 8), strip.name, "black", font)
        for column, (picture, is_framed) in enumerate(
            zip(strip.pictures, strip.framed, strict=True)
        ):
            pixels = (picture.clamp(0, 1).movedim(0, -1) * 255).round().byte().numpy()
            place = (label_width + column * side, top)
            canvas.paste(Image.fromarray(pixels), place)
            if is_framed:
                corners = (*place, place[0] + side - 1, place[1] + side - 1)
                draw.rectangle(corners, outline=red, width=frame)
    return canvas


def main() -> None:
    """Edit with every method, and report."""
    options = arguments(__doc__, len(attributes))
    labs = {name: Lab(name) for name in ("sd3", "flux", "sd15")}
    labs["sd3"].clip = shallow_clip("sd3")
    cases = {
        name: list(edits.cases(lab, "held-out", options.seed, options.count, batch=1))
        for name, lab in labs.items()
    }
    shown = cases["sd3"]
    unframed = [False] * len(shown)
    strips = [Strip("source", [case.source[0] for case in shown], unframed)]
    strips.append(Strip("true edit", [case.target[0] for case in shown], unframed))
    # The first edit by a model also loads it.
    flowedit(labs["sd3"], shown[0])
    inverted(labs["flux"], cases["flux"][0], "RF-Inversion")
    _studio(labs["sd3"])
    rows = []
    for name, (lab, method) in methods().items():
        found = [measured(labs[lab], case, method) for case in cases[lab]]
        missed = [row["edited"] == 0 for row, _ in found]
        strips.append(Strip(name, [picture for _, picture in found], missed))
        wanted = [asked_for(case)[1] for case in shown]
        fails = [words for words, is_missed in zip(wanted, missed, strict=True) if is_missed]
        row = mean_row(f"{name} ({lab})", [row for row, _ in found])
        rows.append({**row, "fails": ", ".join(fails)})
        print(rows[-1], flush=True)
    target = (options.json or Path("report.json")).with_suffix(".jpg")
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet(shown, strips).save(target, quality=90)
    report(rows, columns, options.json, f"{notes}\n\n![edits]({target.name})")


notes = (
    "Means over the edits in the picture below, one a column; those that did not come have a red "
    "frame and stand in the last column of the table. edited, others_kept: percent of attributes. "
    "identity_kept: 100 minus the mean error of 14 facial measures, in percent of their ranges. "
    "PSNR in dB; outside: beyond 8 px of the true mask, against the source as the codec decodes "
    "it, before compositing; whole: against the true edit. model_calls and seconds of one edit "
    "with all that belongs to it: finding a mask, inverting, optimising, learning the person; a "
    "call may be about several latents. The models are the shipped ones (sd3, flux, sd15 format), "
    "and not equally good: compare rows of one model."
)


if __name__ == "__main__":
    main()
