"""Memory of a picture in attention: record values, inject them, and structure-to-detail edits."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder
from torch import Tensor

from ..kernels.solvers import Trend
from .host import arguments, expanding, layouts, progress, recording, sculpting, values, widgets
from .host.expanding import Link
from .host.inversion import Method, SolverSettings
from .host.inversion import Trajectory as TrajectoryValue


class RecordValues(io.ComfyNode):
    """Tells an inversion to remember attention values."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointRecordValues",
            display_name="Record Values",
            category="pinpoint/attention",
            description=(
                "Tells an Invert node to remember what the picture's tokens said in attention, for "
                "Inject Values to repeat."
            ),
            search_aliases=["rf-edit", "attention features", "kv cache"],
            inputs=[
                io.Model.Input("model", tooltip="For an Invert node."),
                widgets.blocks(),
                widgets.part("start", 0.0, "Where recording begins: 0 is noise, 1 the picture."),
                widgets.part("end", 0.2, "Where it ends. A longer part needs more memory."),
                io.Combo.Input(
                    "tokens",
                    options=["image", "image and text"],
                    default="image",
                    tooltip=(
                        "Whose values: the picture's, or the prompt's too, as RF-Edit publishes it."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(recording.PRECISIONS),
                    default="fp16",
                    tooltip="How values are stored. fp8 halves the memory of fp16.",
                ),
                io.Combo.Input(
                    "device",
                    options=["CPU", "GPU"],
                    default="CPU",
                    tooltip="Where values are kept. CPU memory is page-locked for fast copies.",
                ),
                io.Float.Input(
                    "limit_gb",
                    default=8.0,
                    min=0.01,
                    max=1024.0,
                    step=0.01,
                    tooltip="Invert refuses, before it starts, to record more than this.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For an Invert node. Elsewhere it does nothing.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        blocks: str,
        start: float,
        end: float,
        tokens: recording.Tokens,
        precision: recording.Precision,
        device: str,
        limit_gb: float,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        settings = recording.RecordSettings(
            layouts.chosen_blocks(model, blocks),
            *values.window_of(model, start, end),
            tokens,
            precision,
            device == "GPU",
            limit_gb * 1e9,
        )
        return io.NodeOutput(recording.recording_model(model, settings))


class InjectValues(io.ComfyNode):
    """Repeats a picture's attention values in another sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointInjectValues",
            display_name="Inject Values",
            category="pinpoint/attention",
            description=(
                "Keeps a picture's look outside a mask: its attention values take the place of the "
                "new picture's, from a trajectory or from the source prompt in the same model call."
            ),
            search_aliases=[
                "rf-edit",
                "attention injection",
                "value injection",
                "feature injection",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                widgets.blocks(),
                widgets.part("start", 0.0, "Where injection begins: 0 is noise, 1 the picture."),
                widgets.part("end", 0.2, "Where it ends. Later keeps more and edits less."),
                widgets.part("strength", 1.0, "How much of the source's values is taken."),
                widgets.trend("trend", "How the strength changes from start to end."),
                widgets.Trajectory.Input(
                    "trajectory",
                    optional=True,
                    tooltip=(
                        "From Invert, with recorded values. Without it, values come from the "
                        "source prompt's branch of a Source/Target or Prompt-to-Prompt Guider."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the new picture keeps its own values; nowhere if absent.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For a guider or sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        blocks: str,
        start: float,
        end: float,
        strength: float,
        trend: Trend,
        trajectory: TrajectoryValue | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        if mask is not None:
            arguments.require_finite_mask(mask)
        settings = values.InjectSettings(
            layouts.chosen_blocks(model, blocks),
            *values.window_of(model, start, end),
            mask,
            strength,
            trend,
        )
        if trajectory is None:
            return io.NodeOutput(values.sharing_model(model, settings))
        return io.NodeOutput(values.injecting_model(model, settings, trajectory))


class StructureSampler(io.ComfyNode):
    """S2D-EC's structure phase as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointStructureSampler",
            display_name="Structure Sampler",
            category="pinpoint/edit",
            description=(
                "Samples a new picture whose latents outside a mask follow the inverted source: "
                "the structure half of Flux-Sculptor, whose detail half is Inject Values."
            ),
            search_aliases=["flux-sculptor", "s2d-ec", "latent fusion", "kv-edit"],
            inputs=[
                widgets.Trajectory.Input("trajectory", tooltip="From Invert."),
                io.Mask.Input("mask", tooltip="Where to edit; any size."),
                widgets.method(),
                widgets.part("start", 0.0, "Part of the steps after which fusion begins."),
                widgets.part("end", 1.0, "Part of the steps after which fusion ends. 1 = never."),
                widgets.part("strength", 1.0, "How much of the inverted latent is taken."),
                widgets.trend("trend", "How the strength changes from start to end."),
                io.Boolean.Input(
                    "anchor",
                    default=True,
                    tooltip="At the end, put the source's latent back outside the mask.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    tooltip="For SamplerCustomAdvanced, with Invert's noise and the source latent."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        trajectory: TrajectoryValue,
        mask: Tensor,
        method: Method,
        start: float,
        end: float,
        strength: float,
        trend: Trend,
        anchor: bool,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        arguments.require_finite_mask(mask)
        if start >= end:
            progress.warn(f"start {start:g} is not before end {end:g}, so no latents are fused")
        structure = sculpting.StructureSettings(mask, start, end, strength, trend, anchor)
        # RF-Inversion's own pull towards the picture would reach into the mask.
        solver = SolverSettings(method, eta=0.0)
        return io.NodeOutput(sculpting.SculptSampler(solver, structure, trajectory))


class StructureDetailEdit(io.ComfyNode):
    """Flux-Sculptor in one node; expands into the nodes that it is made of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointStructureDetailEdit",
            display_name="Structure-to-Detail Edit",
            category="pinpoint/edit",
            description=(
                "Edits a picture by words through inversion: finds the region, keeps structure by "
                "fusing latents with the inverted source and detail by fusing attention values."
            ),
            search_aliases=["flux-sculptor", "sculptor", "rf-edit", "edit with inversion"],
            enable_expand=True,
            inputs=[
                io.Model.Input("model", raw_link=True, tooltip="A flow model, such as Flux."),
                io.Clip.Input("clip", raw_link=True, tooltip="The model's text encoder."),
                io.Latent.Input("latent", raw_link=True, tooltip="The picture, from VAE Encode."),
                widgets.prompt("source_prompt", "Describes the picture as it is."),
                widgets.prompt("target_prompt", "The same words, with what shall change changed."),
                io.Int.Input(
                    "steps", default=15, min=1, max=1000, tooltip="Each way, to noise and back."
                ),
                io.Float.Input(
                    "guidance",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale of the target prompt. Flux.1: 2 to 3.5.",
                ),
                widgets.method(),
                io.Combo.Input(
                    "locator",
                    options=["attention", "velocity"],
                    default="attention",
                    tooltip=(
                        "How the region is found if no mask is connected: where the picture looks "
                        "at the changed words, or where the prompts move it differently."
                    ),
                ),
                widgets.part("mask_threshold", 0.25, "Lower edits more of the picture."),
                widgets.part("structure_end", 1.0, "Part of the steps in which latents are fused."),
                widgets.part("detail_start", 0.0, "Where fusion of attention values begins."),
                widgets.part("detail_end", 0.2, "Where it ends. Later keeps more."),
                widgets.blocks(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the noises that the region is found with, and of RF-Inversion's.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    raw_link=True,
                    tooltip="Where to edit; found automatically if absent.",
                ),
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
        clip: Link,
        latent: Link,
        source_prompt: str,
        target_prompt: str,
        steps: int,
        guidance: float,
        method: Method,
        locator: str,
        mask_threshold: float,
        structure_end: float,
        detail_start: float,
        detail_end: float,
        blocks: str,
        seed: int,
        mask: Link | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        graph = GraphBuilder()
        source, target, empty = (
            graph.node("CLIPTextEncode", clip=clip, text=text).out(0)
            for text in (source_prompt, target_prompt, "")
        )
        sigmas = graph.node(
            "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0
        ).out(0)
        found = {"model": model, "latent": latent, "threshold": mask_threshold, "seed": seed}
        if mask is None and locator == "attention":
            texts = {"source_prompt": source_prompt, "target_prompt": target_prompt}
            mask = expanding.add(graph, "PinpointAttentionMask", clip=clip, **texts, **found).out(0)
        elif mask is None:
            prompts = {"source": source, "target": target}
            mask = expanding.add(graph, "PinpointVelocityMask", **prompts, **found).out(0)
        fused = {"blocks": blocks, "start": detail_start, "end": detail_end}
        recorder, editing = model, model
        if detail_end > detail_start:
            recorder = expanding.add(graph, "PinpointRecordValues", model=model, **fused).out(0)
        inverted = graph.node(
            "PinpointInvert",
            model=recorder,
            source=source,
            latent=latent,
            sigmas=sigmas,
            method=method,
            guidance=1.0,
            gamma=0.5,
            seed=seed,
            measure_round_trip=False,
        )
        if detail_end > detail_start:
            editing = expanding.add(
                graph,
                "PinpointInjectValues",
                model=model,
                trajectory=inverted.out(2),
                mask=mask,
                **fused,
            ).out(0)
        sampler = expanding.add(
            graph,
            "PinpointStructureSampler",
            trajectory=inverted.out(2),
            mask=mask,
            method=method,
            end=structure_end,
        ).out(0)
        guider = graph.node(
            "PinpointSourceTargetGuider",
            model=editing,
            source=source,
            target=target,
            negative=empty,
            source_guidance=1.0,
            target_guidance=guidance,
            guidance_mode="auto",
        )
        edited = graph.node(
            "SamplerCustomAdvanced",
            noise=inverted.out(0),
            guider=guider.out(0),
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        return io.NodeOutput(edited.out(0), mask, expand=graph.finalize())


nodes = [RecordValues, InjectValues, StructureSampler, StructureDetailEdit]
