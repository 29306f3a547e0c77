"""Where to edit: masks from prompts, and pasting an edit back into its picture."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels import masks, pictures
from .host import arguments
from .host.locating import HeatSettings, probing_guider, rough_picture, velocity_heat


class VelocityMask(io.ComfyNode):
    """FocusFlow's phase 1 as a node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointVelocityMask",
            display_name="Velocity Mask",
            category="pinpoint/locate",
            description=(
                "Finds the region that an edit is about, by comparing where a flow model would "
                "move a picture for the source prompt and for the target prompt."
            ),
            search_aliases=["focusflow", "diffedit", "automatic mask", "mask from prompt"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A flow model: SD3, SD3.5, Flux, Qwen-Image, Z-Image, Wan …"
                ),
                io.Conditioning.Input("source", tooltip="Describes the picture as it is."),
                io.Conditioning.Input("target", tooltip="Describes the picture as it shall be."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Float.Input(
                    "noise_level",
                    default=0.75,
                    min=0.05,
                    max=0.99,
                    step=0.01,
                    tooltip=(
                        "Sigma at which the prompts are compared. High finds whole objects, low "
                        "finds details. FocusFlow's strength 0.5 on SD3 is 0.74."
                    ),
                ),
                io.Int.Input(
                    "samples",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Noises to average. More give a cleaner mask and cost time.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip=(
                        "Given to models with embedded guidance (Flux.1-dev). Classifier-free "
                        "guidance cancels out of the mask, so other models run without it."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Heat from which a place belongs to the region. Lower finds more.",
                ),
                io.Float.Input(
                    "softness",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "How gradually the soft mask rises around the threshold. Threshold 0.5 "
                        "with softness 1 is FocusFlow's mask as published; 0 is a hard edge."
                    ),
                ),
                io.Int.Input(
                    "dilation",
                    default=0,
                    min=0,
                    max=63,
                    tooltip=(
                        "Grow the heat by the maximum over this many latent cells (odd; 0 = off)."
                    ),
                ),
                io.Int.Input(
                    "blur",
                    default=5,
                    min=0,
                    max=63,
                    tooltip="Smooth the heat over this many latent cells (odd; 0 = off).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Sample k draws its noise with seed + 100 k.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture to lay the heat map over; a rough preview if absent.",
                ),
                io.Float.Input(
                    "clip_low",
                    default=1.0,
                    min=0.0,
                    max=49.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Percentile of the heat that becomes 0.",
                ),
                io.Float.Input(
                    "clip_high",
                    default=99.0,
                    min=51.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Percentile of the heat that becomes 1.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="soft mask", tooltip="0 to 1, 1 = edit; for edit samplers."
                ),
                io.Mask.Output(
                    display_name="mask", tooltip="0 or 1: heat at the threshold and above."
                ),
                io.Image.Output(display_name="heat map", tooltip="The heat over the picture."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        source: io.Conditioning.Type,
        target: io.Conditioning.Type,
        latent: io.Latent.Type,
        noise_level: float,
        samples: int,
        guidance: float,
        threshold: float,
        softness: float,
        dilation: int,
        blur: int,
        seed: int,
        image: Tensor | None = None,
        clip_low: float = 1.0,
        clip_high: float = 99.0,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        samples_latent = arguments.latent_samples(model, latent)
        if image is not None and len(image) not in (1, len(samples_latent)):
            raise ValueError(
                f"image has {len(image)} pictures, the latent {len(samples_latent)}: use one "
                "picture, or one for each"
            )
        guider = probing_guider(model, source, target, guidance)
        heat = velocity_heat(
            guider,
            samples_latent,
            HeatSettings(noise_level, samples, clip_low / 100, clip_high / 100, seed),
        )
        heat = masks.blurred(masks.dilated(heat, dilation), blur)
        height, width = arguments.pixel_size(model, samples_latent)
        soft = masks.resized(masks.contrasted(heat, threshold, softness), height, width)
        hard = masks.resized(masks.contrasted(heat, threshold, 0.0), height, width)
        picture = rough_picture(guider, samples_latent) if image is None else image[..., :3].cpu()
        picture = arguments.scaled_picture(picture, height, width)
        overlay = pictures.heat_over(picture, heat)
        return io.NodeOutput(soft, hard, overlay, ui=ui.PreviewImage(overlay, cls=cls))


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


nodes = [VelocityMask, CompositeEdit]
