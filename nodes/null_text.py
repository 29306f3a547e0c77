"""Memory of a picture for models that predict noise: null-text inversion and its replay."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from .host import arguments, inverting, optimising, widgets
from .host.inversion import Trajectory
from .host.null_text import ReplayGuider
from .host.optimising import OptimiseSettings


class NullTextInversion(io.ComfyNode):
    """The noise that a picture came from, and embeddings that lead back to it with guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointNullTextInversion",
            display_name="Null-Text Inversion",
            category="pinpoint/edit",
            description=(
                "Runs a picture backwards to noise with SD1.5, SD2 or SDXL, and tunes the empty "
                "prompt for each step so that sampling with guidance leads back to the picture."
            ),
            search_aliases=["null text", "ddim inversion", "nti", "invert sd1.5", "invert sdxl"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2, SDXL or a relative of theirs."),
                io.Conditioning.Input("source", tooltip="Describes the picture as it is."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="Where tuning starts: CLIP Text Encode with an empty text.",
                ),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Sigmas.Input(
                    "sigmas", tooltip="Those of the later sampling; the direction does not matter."
                ),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="That of the later sampling. At 1 there is nothing to tune.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=10,
                    min=0,
                    max=500,
                    tooltip="Gradient steps in each step, at most. 0 is DDIM inversion alone.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=0.0001,
                    max=1.0,
                    step=0.0001,
                    tooltip="Of the tuning at the first step; it halves to the last.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip=(
                        "Error at which a step is good enough, as a multiple of the published one. "
                        "Less is closer and slower; 0 always takes all inner steps."
                    ),
                ),
            ],
            outputs=[
                io.Noise.Output(
                    display_name="noise",
                    tooltip="Leads back to the picture: connect it with the source latent.",
                ),
                io.Latent.Output(display_name="latent", tooltip="The same noise as a latent."),
                widgets.Trajectory.Output(
                    display_name="trajectory",
                    tooltip="Every step of the way, with its embedding: for Null-Text Guider.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Gradient steps, round-trip error and memory."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        source: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        latent: io.Latent.Type,
        sigmas: Tensor,
        guidance: float,
        inner_steps: int,
        learning_rate: float,
        early_stop: float,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        settings = OptimiseSettings(inner_steps, learning_rate, early_stop)
        job = optimising.NullTextInversion(model, source, negative, guidance, settings)
        samples = arguments.latent_samples(model, latent)
        trajectory, report = job.run(samples, sigmas)
        wire = inverting.as_latent(model, trajectory.noise, latent)
        noise = inverting.noise_of(trajectory)
        return io.NodeOutput(noise, wire, trajectory, report, ui=ui.PreviewText(report))


class NullTextGuider(io.ComfyNode):
    """A GUIDER that replays the embeddings of a null-text inversion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointNullTextGuider",
            display_name="Null-Text Guider",
            category="pinpoint/edit",
            description=(
                "Guides any sampler with the tuned embeddings of Null-Text Inversion in place of a "
                "negative prompt."
            ),
            search_aliases=["null text", "cfg guider", "replay"],
            inputs=[
                io.Model.Input("model", tooltip="The model that inverted, or a patched one."),
                widgets.Trajectory.Input("trajectory", tooltip="From Null-Text Inversion."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The source prompt gives the picture back, a changed one edits it.",
                ),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="That of the inversion leads back; another leads elsewhere.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced with Euler or DDIM.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        trajectory: Trajectory,
        positive: io.Conditioning.Type,
        guidance: float,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        return io.NodeOutput(ReplayGuider(model, trajectory, positive, guidance))


nodes = [NullTextInversion, NullTextGuider]
