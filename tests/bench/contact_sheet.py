"""Pictures of held-out edits, side by side, one column an edit.

    python tests/bench/contact_sheet.py --json tests/bench/results/contact_sheet.json

Writes a JPEG beside the JSON file; the figures are those of the edits that are shown. Guidance is
that of the demo workflows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bench.edits import Case, cases, flow_edit, scores, velocity_masks
from bench.lab import Lab, Row, arguments, report
from portraits.people import phrase

rows = ["source", "found mask", "FocusFlow", "composited", "true edit", "FlowEdit"]
label_width, label_height = 92, 34
demo_guidance = (1.0, 2.0)


def pictures_of(lab: Lab, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of the sheet for a batch of edits, (B, 3, H, W) each, and FocusFlow's scores."""
    soft, hard = velocity_masks(lab, lab.model, case)
    edited = flow_edit(lab, lab.model, case, "FocusFlow", soft, demo_guidance)
    pasted, _ = lab.run(
        "PinpointCompositeEdit",
        source=case.source.movedim(1, -1),
        edited=edited.movedim(1, -1),
        mask=soft,
        threshold=0.1,
        feather=2,
    )
    flowed = flow_edit(lab, lab.model, case, "FlowEdit", None, demo_guidance)
    mask = soft[:, None].expand(-1, 3, -1, -1)
    shown = [case.source, mask, edited, pasted.movedim(-1, 1), case.target, flowed]
    return dict(zip(rows, shown, strict=True)), scores(case, edited, hard)


def sheet(lab: Lab, all_cases: list[Case]) -> tuple[Image.Image, list[Row]]:
    """The sheet and a row of figures for each of its columns."""
    parts = [pictures_of(lab, case) for case in all_cases]
    shown = {row: torch.cat([pictures[row] for pictures, _ in parts]) for row in rows}
    figures = {name: torch.cat([scored[name] for _, scored in parts]) for name in parts[0][1]}
    edits = [edit for case in all_cases for edit in case.edits]
    size = shown["source"].shape[-1]
    width, height = label_width + len(edits) * size, label_height + len(rows) * size
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for index, row in enumerate(rows):
        top = label_height + index * size
        draw.text((6, top + size // 2 - 6), row, "black", font)
        for column, picture in enumerate(shown[row]):
            pixels = (picture.clamp(0, 1).movedim(0, -1) * 255).round().byte().numpy()
            canvas.paste(Image.fromarray(pixels), (label_width + column * size, top))
    for column, edit in enumerate(edits):
        left = label_width + column * size + 4
        draw.text((left, 4), phrase(edit.attribute, edit.source), "gray", font)
        draw.text((left, 18), f"to {phrase(edit.attribute, edit.target)}", "black", font)
    table = [
        {
            "method": f"{edit.attribute}: {phrase(edit.attribute, edit.target)}",
            **{name: float(values[index]) for name, values in figures.items()},
        }
        for index, edit in enumerate(edits)
    ]
    return canvas, table


def main() -> None:
    """Draw the sheet and report its figures."""
    options = arguments(__doc__, 12)
    lab = Lab()
    picture, table = sheet(lab, list(cases(lab, "held-out", options.seed, options.count)))
    target = (options.json or Path("contact_sheet.json")).with_suffix(".jpg")
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target, quality=92)
    report(
        table,
        ["method", "mask_iou", "psnr_outside", "psnr_inside", "psnr_whole"],
        options.json,
        f"![edits]({target.name})",
    )
    print(target)


if __name__ == "__main__":
    main()
