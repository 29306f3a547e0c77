"""How to move: the two-prompt guider, the edit samplers, and the one-node edit."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder
from torch import Tensor

from .host import arguments, widgets
from .host.active_tokens import ActiveSettings
from .host.expanding import Link
from .host.guiding import GuidanceMode, SourceTargetGuider
from .host.sampling import EditSampler, EditSettings, Method

highest_guidance = 100.0


class SourceTarget(io.ComfyNode):
    """Two prompts behind one GUIDER wire."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointSourceTargetGuider",
            display_name="Source/Target Guider",
            category="pinpoint/edit",
            description=(
                "Guides an edit by two prompts, the picture as it is and as it shall be, and "
                "remembers what the model said of the source."
            ),
            search_aliases=["edit guider", "flowedit guider", "dual prompt guider"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A flow model: SD3, SD3.5, Flux, Qwen-Image, Z-Image, Wan …"
                ),
                io.Conditioning.Input("source", tooltip="Describes the picture as it is."),
                io.Conditioning.Input("target", tooltip="Describes the picture as it shall be."),
                io.Float.Input(
                    "source_guidance",
                    default=3.5,
                    min=0.0,
                    max=highest_guidance,
                    step=0.1,
                    tooltip="Guidance scale of the source prompt. FlowEdit: SD3 3.5, Flux.1 1.5.",
                ),
                io.Float.Input(
                    "target_guidance",
                    default=13.5,
                    min=0.0,
                    max=highest_guidance,
                    step=0.1,
                    tooltip=(
                        "Guidance scale of the target prompt; higher edits more. FlowEdit: SD3 "
                        "13.5, Flux.1 5.5."
                    ),
                ),
                io.Combo.Input(
                    "guidance_mode",
                    options=["auto", "cfg", "embedded"],
                    default="auto",
                    tooltip=(
                        "cfg: classifier-free guidance, two evaluations for each prompt. embedded: "
                        "the number is given to the model (Flux.1-dev). auto asks the model."
                    ),
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="For cfg other than 1; an empty text is usual. Not used when embedded.",
                ),
                widgets.remember_source(),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced with an Edit Sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        source: io.Conditioning.Type,
        target: io.Conditioning.Type,
        source_guidance: float,
        target_guidance: float,
        guidance_mode: GuidanceMode,
        negative: io.Conditioning.Type | None = None,
        remember_source: bool = True,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        return io.NodeOutput(
            SourceTargetGuider(
                model,
                source,
                target,
                negative,
                source_guidance,
                target_guidance,
                guidance_mode,
                remembers=remember_source,
            )
        )


class EditSamplerNode(io.ComfyNode):
    """FlowEdit and FocusFlow behind one SAMPLER wire."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointEditSampler",
            display_name="Edit Sampler",
            category="pinpoint/edit",
            description=(
                "Moves a picture from the source to the target prompt without inverting it, for "
                "SamplerCustomAdvanced with a Source/Target Guider."
            ),
            search_aliases=["focusflow", "flowedit", "inversion-free editing"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=["FocusFlow", "FlowEdit", "FocusFlow as published"],
                    default="FocusFlow",
                    tooltip=(
                        "FocusFlow moves only inside the mask. FlowEdit has no mask. FocusFlow as "
                        "published blends whole velocities like the authors' code: it changes the "
                        "whole picture and is here for reproduction."
                    ),
                ),
                io.Int.Input(
                    "n_max",
                    default=20,
                    min=0,
                    max=10000,
                    tooltip=(
                        "Steps that are run, counted from the end of the schedule: the strength "
                        "of the edit. FlowEdit: SD3 33 of 50, Flux.1 24 of 28."
                    ),
                ),
                io.Int.Input(
                    "n_min",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip=(
                        "Of these, the last steps that sample the target prompt freely inside the "
                        "mask: more change, less of the source's structure."
                    ),
                ),
                io.Int.Input(
                    "n_avg",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Noises averaged in a step: steadier edits at n times the cost.",
                ),
                io.Boolean.Input(
                    "reanchor",
                    default=False,
                    tooltip=(
                        "Pull the outside of a soft mask back to the source before every step. "
                        "Has no effect on hard masks."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where to edit, 1 = edit, any size. Multiplied with the latent's noise "
                        "mask if it has one. None edits everywhere."
                    ),
                ),
                widgets.active_tokens(),
                io.Int.Input(
                    "refresh",
                    default=6,
                    min=1,
                    max=10000,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "With active_tokens: what is seen outside the mask is taken anew from the "
                        "source every so many steps. With a remembered source, the model is asked "
                        "about it in these steps only."
                    ),
                ),
                io.Int.Input(
                    "halo",
                    default=1,
                    min=0,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="With active_tokens: tokens around the mask that are calculated too.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        method: Method,
        n_max: int,
        n_min: int,
        n_avg: int,
        reanchor: bool,
        mask: Tensor | None = None,
        active_tokens: bool = False,
        refresh: int = 6,
        halo: int = 1,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        if n_min > n_max:
            raise ValueError(
                f"n_min is {n_min}, more than n_max ({n_max}): it counts the last of those steps, "
                "so lower it"
            )
        active = ActiveSettings(refresh, halo) if active_tokens else None
        settings = EditSettings(method, n_max, n_min, n_avg, reanchor, mask, active)
        return io.NodeOutput(EditSampler(settings))


class EditWithWords(io.ComfyNode):
    """The common case in one node, built from the others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointEditWithWords",
            display_name="Edit with Words",
            category="pinpoint/edit",
            description=(
                "Edits a picture from a source prompt to a target prompt, only where the two "
                "disagree, and returns the edited latent with the mask."
            ),
            search_aliases=["focusflow", "local edit", "prompt edit", "edit image"],
            enable_expand=True,
            inputs=[
                io.Model.Input(
                    "model",
                    raw_link=True,
                    tooltip="A flow model: SD3, SD3.5, Flux, Qwen-Image, Z-Image, Wan …",
                ),
                io.Conditioning.Input(
                    "source", raw_link=True, tooltip="Describes the picture as it is."
                ),
                io.Conditioning.Input(
                    "target", raw_link=True, tooltip="Describes the picture as it shall be."
                ),
                io.Latent.Input("latent", raw_link=True, tooltip="The picture, from VAE Encode."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the edit's noise. The mask has its own fixed noise.",
                ),
                io.Int.Input(
                    "steps", default=28, min=1, max=10000, tooltip="Steps of the whole schedule."
                ),
                io.Float.Input(
                    "strength",
                    default=0.85,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of the steps that are run: higher changes shapes, lower only "
                        "colours and texture. FlowEdit: SD3 0.66, Flux.1 0.86."
                    ),
                ),
                io.Float.Input(
                    "source_guidance",
                    default=1.5,
                    min=0.0,
                    max=highest_guidance,
                    step=0.1,
                    tooltip="Guidance scale of the source prompt. FlowEdit: SD3 3.5, Flux.1 1.5.",
                ),
                io.Float.Input(
                    "target_guidance",
                    default=5.5,
                    min=0.0,
                    max=highest_guidance,
                    step=0.1,
                    tooltip="Guidance scale of the target prompt. FlowEdit: SD3 13.5, Flux.1 5.5.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For the automatic mask: lower edits more of the picture.",
                ),
                io.Int.Input(
                    "mask_blur",
                    default=3,
                    min=0,
                    max=63,
                    tooltip="For the automatic mask: smooth it over this many latent cells.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    raw_link=True,
                    tooltip="An empty text is usual. Not needed for models with embedded guidance.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    raw_link=True,
                    tooltip="Where to edit; found automatically if absent.",
                ),
                widgets.remember_source(),
                widgets.active_tokens(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The edit, for VAE Decode."),
                io.Mask.Output(display_name="mask", tooltip="Where the picture was edited."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Link,
        source: Link,
        target: Link,
        latent: Link,
        seed: int,
        steps: int,
        strength: float,
        source_guidance: float,
        target_guidance: float,
        mask_threshold: float,
        mask_blur: int,
        negative: Link | None = None,
        mask: Link | None = None,
        remember_source: bool = True,
        active_tokens: bool = False,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        graph = GraphBuilder()
        prompts = {"model": model, "source": source, "target": target}
        if mask is None:
            located = graph.node(
                "PinpointVelocityMask",
                **prompts,
                latent=latent,
                noise_level=0.75,
                samples=10,
                guidance=source_guidance,
                threshold=mask_threshold,
                softness=0.3,
                dilation=0,
                blur=mask_blur,
                seed=0,
                remember_source=remember_source,
            )
            mask = located.out(0)
        guider = graph.node(
            "PinpointSourceTargetGuider",
            **prompts,
            source_guidance=source_guidance,
            target_guidance=target_guidance,
            guidance_mode="auto",
            remember_source=remember_source,
            **({} if negative is None else {"negative": negative}),
        )
        sampler = graph.node(
            "PinpointEditSampler",
            method="FocusFlow",
            n_max=round(steps * strength),
            n_min=0,
            n_avg=1,
            reanchor=False,
            mask=mask,
            active_tokens=active_tokens,
        )
        sigmas = graph.node(
            "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0
        )
        edited = graph.node(
            "SamplerCustomAdvanced",
            noise=graph.node("RandomNoise", noise_seed=seed).out(0),
            sampler=sampler.out(0),
            sigmas=sigmas.out(0),
            latent_image=latent,
            # Last, because ComfyUI begins there: it refuses bad prompts before the mask is sought.
            guider=guider.out(0),
        )
        return io.NodeOutput(edited.out(0), mask, expand=graph.finalize())


nodes = [EditWithWords, SourceTarget, EditSamplerNode]
