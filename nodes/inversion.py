"""Memory of a picture: solvers that run a flow both ways, and inversion to noise."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels.solvers import Trend
from .host import arguments, inverting, progress, widgets
from .host.inversion import FlowSampler, Method, SolverSettings


class FlowSolver(io.ComfyNode):
    """A SAMPLER that runs a flow in either direction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointFlowSolver",
            display_name="Flow Solver",
            category="pinpoint/edit",
            description=(
                "A sampler for flow models that follows its sigmas in either direction: falling "
                "ones sample, rising ones (Flip Sigmas) invert a picture to noise."
            ),
            search_aliases=[
                "rf-solver",
                "fireflow",
                "rf-inversion",
                "inversion sampler",
                "unsample",
            ],
            inputs=[
                widgets.method(),
                widgets.part(
                    "gamma",
                    0.5,
                    "RF-Inversion, rising sigmas: pull towards fresh noise. 0 is plain "
                    "inversion; higher ends in noise that is easier to edit and remembers less.",
                ),
                widgets.part(
                    "eta",
                    0.9,
                    "RF-Inversion, falling sigmas: pull towards the picture in the latent.",
                ),
                widgets.part(
                    "eta_start",
                    0.0,
                    "RF-Inversion: part of the steps after which eta begins to act.",
                ),
                widgets.part(
                    "eta_end",
                    0.35,
                    "RF-Inversion: part of the steps after which eta stops. 1 = never.",
                ),
                widgets.trend("eta_trend", "RF-Inversion: how eta changes from start to end."),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        method: Method,
        gamma: float,
        eta: float,
        eta_start: float,
        eta_end: float,
        eta_trend: Trend,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        if method == "RF-Inversion" and eta_start >= eta_end:
            progress.warn(f"eta_start {eta_start:g} is not before eta_end {eta_end:g}: no pull")
        settings = SolverSettings(method, gamma, eta, eta_start, eta_end, eta_trend)
        return io.NodeOutput(FlowSampler(settings))


class Invert(io.ComfyNode):
    """The noise that a picture came from, and the way to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointInvert",
            display_name="Invert",
            category="pinpoint/edit",
            description=(
                "Runs a picture backwards to the noise that leads to it again, and remembers every "
                "step of the way for edits."
            ),
            search_aliases=["inversion", "image to noise", "unsampler", "ddim inversion"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A flow model; one from Record Values leaves its values with the way.",
                ),
                io.Conditioning.Input("source", tooltip="Describes the picture as it is."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Sigmas.Input(
                    "sigmas", tooltip="Those of the later sampling; the direction does not matter."
                ),
                widgets.method(),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip=(
                        "1 is exact for most models. Given as a number to models with embedded "
                        "guidance (Flux.1-dev); others need a negative prompt when it is not 1."
                    ),
                ),
                widgets.part("gamma", 0.5, "RF-Inversion only: pull towards fresh noise."),
                widgets.seed("RF-Inversion only: of the fresh noise."),
                io.Boolean.Input(
                    "measure_round_trip",
                    default=True,
                    tooltip=(
                        "Sample back to the picture and report how well it is met. Doubles the "
                        "time; the noise and the trajectory are the same without."
                    ),
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Only for guidance other than 1."
                ),
            ],
            outputs=[
                io.Noise.Output(
                    display_name="noise",
                    tooltip="Leads back to the picture: connect it with the source latent.",
                ),
                io.Latent.Output(display_name="latent", tooltip="The same noise as a latent."),
                widgets.Trajectory.Output(
                    display_name="trajectory", tooltip="Every step of the way, for edits."
                ),
                io.String.Output(
                    display_name="report", tooltip="Model calls, memory and round-trip error."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        source: io.Conditioning.Type,
        latent: io.Latent.Type,
        sigmas: Tensor,
        method: Method,
        guidance: float,
        gamma: float,
        seed: int,
        measure_round_trip: bool,
        negative: io.Conditioning.Type | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        job = inverting.Inversion(
            model, source, negative, guidance, SolverSettings(method, gamma), seed
        )
        samples = arguments.latent_samples(model, latent)
        trajectory, report = job.run(samples, sigmas, measure_round_trip)
        noise = inverting.noise_of(trajectory)
        wire = inverting.as_latent(model, trajectory.noise, latent)
        if "noise_mask" in latent:
            progress.warn("an inversion runs on the whole picture; the latent's mask is not used")
        return io.NodeOutput(noise, wire, trajectory, report, ui=ui.PreviewText(report))


class NoiseFromLatent(io.ComfyNode):
    """An inverted latent as NOISE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointNoiseFromLatent",
            display_name="Noise from Latent",
            category="pinpoint/edit",
            description=(
                "Turns a latent that a Flow Solver inverted into a sampler's noise: sampling then "
                "starts exactly where the inversion ended."
            ),
            search_aliases=["inverted noise", "latent to noise"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the latent."),
                io.Latent.Input("latent", tooltip="From a sampler with rising sigmas."),
            ],
            outputs=[
                io.Noise.Output(tooltip="For SamplerCustomAdvanced, with the source as latent.")
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, latent: io.Latent.Type) -> io.NodeOutput:
        return io.NodeOutput(inverting.noise_from(model, arguments.latent_samples(model, latent)))


nodes = [FlowSolver, Invert, NoiseFromLatent]
