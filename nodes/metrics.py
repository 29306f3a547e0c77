"""What an edit changed and what it kept, in numbers and side by side."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels import changes, pictures
from .host import arguments, lpips_nets, progress, scoring, sheets, widgets


class EditScore(io.ComfyNode):
    """The scores that papers on editing give."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointEditScore",
            display_name="Edit Score",
            category="pinpoint/measure",
            description=(
                "Measures an edit: what is left of the background, how much of the structure, the "
                "words and the person, each with the networks that are connected."
            ),
            search_aliases=["psnr", "ssim", "lpips", "clip score", "dino", "metrics", "pie-bench"],
            inputs=[
                io.Image.Input("source", tooltip="The picture as it was; one, or one for each."),
                io.Image.Input("edited", tooltip="The edit; one or a batch, the source's size."),
                widgets.prompt("source_prompt", "Describes the source, for CLIP's direction."),
                widgets.prompt("target_prompt", "Describes the edit, for the scores with words."),
                io.Combo.Input(
                    "lpips",
                    options=["none", *lpips_nets.BACKBONES],
                    default="none",
                    tooltip=(
                        "The network of LPIPS: squeeze in PIE-Bench, alex in most papers. Its "
                        "backbone has to be in models/lpips."
                    ),
                ),
                io.Combo.Input(
                    "regions",
                    options=list(scoring.REGIONS),
                    default=scoring.REGIONS[0],
                    tooltip=(
                        "With a mask: score pictures that are black outside the region, as "
                        "PIE-Bench does, or the region's own pixels only."
                    ),
                ),
                io.String.Input(
                    "names", default="", tooltip="Names of the edits, separated by commas."
                ),
                io.Image.Input(
                    "target", optional=True, tooltip="The true edit, where it is known."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where to edit, 1 = edit; inside from 0.5 on."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the CLIP of clip_vision, with text projection.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="A CLIP: for CLIP-I, and for words."
                ),
                io.ClipVision.Input(
                    "dino", optional=True, tooltip="A DINOv2: for DINO-I and the structure."
                ),
                io.ClipVision.Input(
                    "identity",
                    optional=True,
                    tooltip="An encoder that tells people apart, for the cosine of identities.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="background psnr",
                    tooltip="In dB, at most 100; without a mask of the whole. -1 = not defined.",
                ),
                io.Float.Output(
                    display_name="background ssim", tooltip="At most 1. -1 = not defined."
                ),
                io.Float.Output(
                    display_name="background lpips", tooltip="0 = the same. -1 = not defined."
                ),
                io.Float.Output(
                    display_name="structure distance", tooltip="0 = the same. -1 = not defined."
                ),
                io.Float.Output(
                    display_name="clip whole",
                    tooltip="Cosine of the edit and the target prompt. -1 = not defined.",
                ),
                io.String.Output(
                    display_name="table", tooltip="All scores, scaled as they are published."
                ),
                io.String.Output(
                    display_name="csv", tooltip="A head and a row for each edit, in plain units."
                ),
                io.Image.Output(
                    display_name="picture", tooltip="Source, edit, change map and mask."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        source: Tensor,
        edited: Tensor,
        source_prompt: str,
        target_prompt: str,
        lpips: str,
        regions: str,
        names: str,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        clip: io.Clip.Type | None = None,
        clip_vision: io.ClipVision.Type | None = None,
        dino: io.ClipVision.Type | None = None,
        identity: io.ClipVision.Type | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        scoring.require_torchmetrics()
        edits = arguments.compared(source=source, edited=edited, target=target, mask=mask)
        called = arguments.names_for(names, len(edits["source"]))
        if clip is not None and clip_vision is None:
            raise ValueError(
                "clip is connected without clip_vision, so words have no pictures to meet: connect "
                "the vision tower of the same CLIP"
            )
        network = lpips_nets.load(lpips) if lpips in lpips_nets.BACKBONES else None
        by = scoring.Judges(network, clip, clip_vision, dino, identity)
        said = scoring.Prompts(source_prompt.strip(), target_prompt.strip())
        rows, panels = [], []
        for index, name in enumerate(called):
            one = {key: value[index : index + 1] for key, value in edits.items()}
            rows.append(scoring.score(**one, prompts=said, judges_=by, regions=regions))
            panels.append(_panel(name, one["source"], one["edited"], one.get("mask")))
        head, lines = scoring.csv_lines(rows, called)
        table = scoring.table(rows, called)
        progress.show(table)
        mean, area = scoring.mean_row(rows), "whole" if mask is None else "background"
        wires = [f"{area} psnr", f"{area} ssim", f"{area} lpips", "structure distance"]
        picture = torch.cat(panels)
        return io.NodeOutput(
            *(scoring.on_wire(mean, name) for name in (*wires, "clip whole")),
            *(table, f"{head}\n{lines}", picture),
            ui=ui.PreviewImage(picture, cls=cls),
        )


def _panel(name: str, source: Tensor, edited: Tensor, mask: Tensor | None) -> Tensor:
    before, after = source.movedim(1, -1), edited.movedim(1, -1)
    heat = (changes.difference(source, edited) * 2).clamp(0, 1)
    shown = [
        sheets.Labelled(before[0], "source"),
        sheets.Labelled(after[0], name),
        sheets.Labelled(pictures.heat_over(before, heat)[0], "change"),
    ]
    if mask is not None:
        shown.append(sheets.Labelled(mask[0, ..., None].expand(-1, -1, 3), "mask"))
    return sheets.sheet(shown, len(shown))


class CompareEdits(io.ComfyNode):
    """A contact sheet with scores."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointCompareEdits",
            display_name="Compare Edits",
            category="pinpoint/measure",
            description="Lays several edits of a picture side by side, with names and scores.",
            search_aliases=["contact sheet", "grid", "xy plot", "comparison", "scores"],
            inputs=[
                io.Image.Input("source", tooltip="The picture as it was."),
                io.Image.Input("edited", tooltip="A batch of edits of it, the source's size."),
                io.String.Input(
                    "names", default="", tooltip="Names of the edits, separated by commas."
                ),
                io.Int.Input(
                    "columns",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Pictures in a row, the source with them.",
                ),
                io.String.Input(
                    "show",
                    default="",
                    tooltip=(
                        "Scores to show, separated by commas, as background psnr, clip whole. "
                        "Empty = all that are known."
                    ),
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where to edit, for background and foreground."
                ),
                io.String.Input(
                    "scores",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=(
                        "The csv of Edit Score for the same edits. Empty = PSNR, SSIM and MSE are "
                        "measured here."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet", tooltip="The source and all edits, with their scores."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        source: Tensor,
        edited: Tensor,
        names: str,
        columns: int,
        show: str,
        mask: Tensor | None = None,
        scores: str = "",
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        scoring.require_torchmetrics()
        edits = arguments.compared(source=source, edited=edited, mask=mask)
        called = arguments.names_for(names, len(edits["source"]))
        rows = [
            scoring.score(**{key: value[index : index + 1] for key, value in edits.items()})
            for index in range(len(called) if not scores.strip() else 0)
        ] or scoring.from_csv(scores, len(called))
        chosen = scoring.chosen(show, rows)
        shown = [sheets.Labelled(edits["source"][0].movedim(0, -1), "source")]
        for index, (name, row) in enumerate(zip(called, rows, strict=True)):
            lines = [scoring.line(score, row[score]) for score in chosen]
            shown.append(sheets.Labelled(edits["edited"][index].movedim(0, -1), name, lines))
        result = sheets.sheet(shown, columns)
        return io.NodeOutput(result, ui=ui.PreviewImage(result, cls=cls))


nodes = [EditScore, CompareEdits]
