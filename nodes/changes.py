"""What an editor changed, and what it only moved or tinted."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels import pictures
from .host import arguments, progress, repairs


class ChangeMask(io.ComfyNode):
    """The region that an editor changed on purpose."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointChangeMask",
            display_name="Change Mask",
            category="pinpoint/locate",
            description=(
                "Compares a picture with what any editor made of it: takes back the zoom, shift "
                "and colour drift of the whole picture, and finds the region that was changed."
            ),
            search_aliases=["difference mask", "align", "repair", "kontext", "qwen edit", "diff"],
            inputs=[
                io.Image.Input("source", tooltip="The original picture."),
                io.Image.Input("edited", tooltip="What an editor made of it; any size."),
                io.Combo.Input(
                    "align",
                    options=list(repairs.MOTIONS),
                    default="zoom and shift",
                    tooltip="What the editor may have done to the whole picture, to be undone.",
                ),
                io.Boolean.Input(
                    "match_colors",
                    default=True,
                    tooltip=(
                        "Undo a drift of the whole picture's colours: a gain and an offset of "
                        "red, green and blue."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=0.06,
                    min=0.001,
                    max=1.0,
                    step=0.001,
                    tooltip="Difference of a colour from which a pixel was changed, of 1.",
                ),
                io.Int.Input(
                    "tolerance",
                    default=1,
                    min=0,
                    max=16,
                    tooltip=(
                        "Pixels by which edges may be off or blurred without being a change. 0 = "
                        "every difference counts."
                    ),
                ),
                io.Int.Input(
                    "smallest_part",
                    default=16,
                    min=0,
                    max=65536,
                    tooltip="Drop changes of fewer pixels than this.",
                ),
                io.Int.Input(
                    "dilation",
                    default=2,
                    min=0,
                    max=256,
                    tooltip="Grow the mask by this many pixels on each side.",
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=512,
                    tooltip="Width in pixels of the mask's soft rim, laid inside it. 0 = hard.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="aligned",
                    tooltip="The edited picture as it lies over the source, for Composite Edit.",
                ),
                io.Mask.Output(display_name="mask", tooltip="Where it was changed, 1 = changed."),
                io.Image.Output(display_name="heat map", tooltip="The difference over the source."),
                io.String.Output(
                    display_name="report",
                    tooltip="What was done to the whole picture: zoom, shift, colours.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        source: Tensor,
        edited: Tensor,
        align: str,
        match_colors: bool,
        threshold: float,
        tolerance: int,
        smallest_part: int,
        dilation: int,
        feather: int,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        before, after = arguments.same_batch(
            source=arguments.colors("source", source), edited=arguments.colors("edited", edited)
        )
        sight = repairs.Sight(threshold, tolerance, smallest_part, dilation, feather)
        aligned, mask, heat, lines = repairs.aligned_changes(
            before, repairs.at_size_of(before, after), align, match_colors, sight
        )
        report = "\n".join(lines)
        progress.show(report)
        overlay = pictures.heat_over(before.movedim(1, -1), (heat * 2).clamp(0, 1))
        return io.NodeOutput(
            aligned.movedim(1, -1), mask, overlay, report, ui=ui.PreviewImage(overlay, cls=cls)
        )


nodes = [ChangeMask]
