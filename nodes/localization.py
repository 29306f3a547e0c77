"""Where to edit: masks from what two prompts do, and from where a picture looks at words."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels import masks, pictures
from .host import arguments, attention_map, layouts, locating, progress, widgets
from .host.locating import HeatSettings, probing_guider, velocity_heat


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
                *widgets.clip_percentiles(),
                widgets.remember_source(),
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
        remember_source: bool = True,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        samples_latent = arguments.latent_samples(model, latent)
        arguments.require_one_picture_each(image, samples_latent)
        guider = probing_guider(model, source, target, guidance, remembers=remember_source)
        heat = velocity_heat(
            guider,
            samples_latent,
            HeatSettings(noise_level, samples, clip_low / 100, clip_high / 100, seed),
        )
        heat = masks.blurred(masks.dilated(heat, dilation), blur)
        height, width = arguments.pixel_size(model, samples_latent)
        soft = masks.resized(masks.contrasted(heat, threshold, softness), height, width)
        hard = masks.resized(masks.contrasted(heat, threshold, 0.0), height, width)
        picture = locating.rough_picture(model, samples_latent) if image is None else image
        picture = arguments.scaled_picture(picture[..., :3].cpu(), height, width)
        overlay = pictures.heat_over(picture, heat)
        return io.NodeOutput(soft, hard, overlay, ui=ui.PreviewImage(overlay, cls=cls))


class AttentionMask(io.ComfyNode):
    """Flux-Sculptor's prompt-aligned spatial locator as a node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointAttentionMask",
            display_name="Attention Mask",
            category="pinpoint/locate",
            description=(
                "Finds the region of phrases by where the picture looks at their words in the "
                "model's attention: one map for each phrase, and all of them together."
            ),
            search_aliases=["flux-sculptor", "pasl", "mask from words", "daam", "segment by text"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.5, SDXL, SD3, Flux, Flux.2, Chroma, Qwen-Image, Z-Image, Wan …",
                ),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                widgets.prompt(
                    "source_prompt",
                    "Describes the picture as it is; removed phrases are found with it.",
                ),
                widgets.prompt(
                    "target_prompt",
                    "Describes the picture as it shall be; added phrases are found with it.",
                ),
                io.String.Input(
                    "added",
                    default="",
                    tooltip=(
                        "Phrases of the target prompt, separated by commas. If both lists are "
                        "empty, they are the phrases in which the prompts differ."
                    ),
                ),
                io.String.Input(
                    "removed",
                    default="",
                    tooltip="Phrases of the source prompt, separated by commas.",
                ),
                widgets.blocks("25%-100%"),
                widgets.part("highest_noise", 0.85, "Sigma of the first sample."),
                widgets.part("lowest_noise", 0.6, "Sigma of the last sample. Low finds details."),
                io.Int.Input(
                    "samples",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Noise levels and noises to average: model calls for each prompt.",
                ),
                io.Int.Input(
                    "propagation",
                    default=0,
                    min=0,
                    max=4,
                    tooltip=(
                        "Spread the map this often along the picture's own attention, which fills "
                        "surfaces."
                    ),
                ),
                widgets.part("contrast", 0.0, "Take away where the rest of the prompt looks."),
                widgets.part("threshold", 0.25, "Heat from which a place belongs to the region."),
                widgets.part("softness", 0.3, "How gradually the soft mask rises there; 0 = hard."),
                io.Int.Input(
                    "smallest_part",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Drop parts of the region with fewer image tokens than this.",
                ),
                io.Int.Input(
                    "dilation",
                    default=3,
                    min=0,
                    max=63,
                    tooltip=(
                        "Grow the heat by the maximum over this many latent cells (odd; 0 = off)."
                    ),
                ),
                io.Float.Input(
                    "soft_edge",
                    default=0.0,
                    min=0.0,
                    max=16.0,
                    step=0.1,
                    tooltip="Blur the soft mask's edge, in latent cells.",
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
                    tooltip="The picture to lay the heat maps over; a rough preview if absent.",
                ),
                io.String.Input(
                    "heads",
                    default="all",
                    optional=True,
                    advanced=True,
                    tooltip="Attention heads to read: all, or numbers and ranges as 0, 4-7.",
                ),
                *widgets.clip_percentiles(),
            ],
            outputs=[
                io.Mask.Output(display_name="soft mask", tooltip="All phrases, 0 to 1, 1 = edit."),
                io.Mask.Output(display_name="mask", tooltip="All phrases, 0 or 1."),
                io.Mask.Output(
                    display_name="phrase masks",
                    tooltip="A soft mask for each phrase, added ones first; a batch of pictures "
                    "repeats for each phrase.",
                ),
                io.Image.Output(
                    display_name="heat maps", tooltip="All phrases, then each, over the picture."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        latent: io.Latent.Type,
        source_prompt: str,
        target_prompt: str,
        added: str,
        removed: str,
        blocks: str,
        highest_noise: float,
        lowest_noise: float,
        samples: int,
        propagation: int,
        contrast: float,
        threshold: float,
        softness: float,
        smallest_part: int,
        dilation: int,
        soft_edge: float,
        seed: int,
        image: Tensor | None = None,
        heads: str = "all",
        clip_low: float = 1.0,
        clip_high: float = 99.0,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        samples_latent = arguments.latent_samples(model, latent)
        arguments.require_one_picture_each(image, samples_latent)
        if lowest_noise > highest_noise:
            raise ValueError(
                f"lowest_noise is {lowest_noise:g}, above highest_noise ({highest_noise:g}): "
                "exchange them"
            )
        settings = attention_map.GatherSettings(
            layouts.chosen_blocks(model, blocks),
            attention_map.chosen_heads(heads),
            highest_noise,
            lowest_noise,
            samples,
            propagation,
            seed,
        )
        requests = attention_map.requests_for(source_prompt, target_prompt, added, removed)
        maps = attention_map.located(model, clip, requests, samples_latent, settings)
        bounds = clip_low / 100, clip_high / 100
        heat = torch.cat([attention_map.phrase_heat(m, *bounds, contrast) for m in maps], 1)
        shape = attention_map.MaskShape(threshold, softness, smallest_part, dilation, soft_edge)
        size = arguments.pixel_size(model, samples_latent)
        count = heat.shape[1]
        heats = heat.transpose(0, 1).flatten(0, 1)
        cleaned = shape.cleaned(heats, samples_latent.shape[-2:])
        union = cleaned.unflatten(0, (count, -1)).amax(0)
        soft, hard, each = (
            masks.resized(mask, *size)
            for mask in (shape.soft(union), shape.hard(union), shape.soft(cleaned))
        )
        picture = locating.rough_picture(model, samples_latent) if image is None else image
        picture = arguments.scaled_picture(picture[..., :3].cpu(), *size)
        shown = torch.cat([union, cleaned])
        overlay = pictures.heat_over(_repeated(picture, len(shown)), shown)
        wanted = [phrase for request in requests for phrase in request.wanted]
        progress.show("all together, then: " + ", ".join(wanted))
        if not hard.any():
            progress.warn("nothing is hot enough for the mask: lower threshold or smallest_part")
        return io.NodeOutput(soft, hard, each, overlay, ui=ui.PreviewImage(overlay, cls=cls))


def _repeated(pictures: Tensor, count: int) -> Tensor:
    """A batch of pictures over and over, `count` in all."""
    return pictures.repeat(count // len(pictures), 1, 1, 1)


nodes = [VelocityMask, AttentionMask]
