"""Outside is outside: pasting an edit back into its picture."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..kernels import masks
from .host import arguments


class CompositeEdit(io.ComfyNode):
    """Keeps every pixel outside the mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointCompositeEdit",
            display_name="Composite Edit",
            category="pinpoint/locate",
            description=(
                "Pastes an edited picture into its source inside a mask; every pixel outside the "
                "mask stays the source's, bit for bit."
            ),
            search_aliases=["paste back", "stitch", "blend edit", "keep background"],
            inputs=[
                io.Image.Input("source", tooltip="The original picture."),
                io.Image.Input(
                    "edited",
                    tooltip="The edited picture: same size, or as VAE Encode cropped it.",
                ),
                io.Mask.Input("mask", tooltip="Where to take the edited picture; any size."),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Mask value from which a pixel is inside. Values below are outside.",
                ),
                io.Int.Input(
                    "feather",
                    default=4,
                    min=0,
                    max=512,
                    tooltip=(
                        "Width in pixels of the blend, laid inside the mask so that the outside "
                        "is never touched. 0 = hard edge."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The source with the edit in place."),
                io.Mask.Output(
                    display_name="opacity", tooltip="How much of the edit each pixel shows."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, source: Tensor, edited: Tensor, mask: Tensor, threshold: float, feather: int
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        source, edited, mask = arguments.same_batch(source=source, edited=edited, mask=mask)
        edited, covered = arguments.placed_over(edited[..., :3], source)
        mask = arguments.placed_mask(mask, covered, source) * covered
        opacity = masks.feathered_inward(mask, max(threshold, 1e-6), feather)
        blend = opacity[..., None]
        colors = source[..., :3].lerp(edited.to(source), blend.to(source))
        colors = colors.where(blend.to(source.device) > 0, source[..., :3])
        result = source.clone()
        result[..., :3] = colors
        return io.NodeOutput(result, opacity)


nodes = [CompositeEdit]
