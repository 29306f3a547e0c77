"""Who is in the picture, by adapters: FlexIP's loaded, gated and applied."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..kernels.flexip import Mode
from ..kernels.gates import SHAPES
from .host import adapter_files, adapting, arguments, gates, progress, tensor_files, widgets
from .host.adapters import Adapter
from .host.gates import Gate
from .host.subjects import Subject

modes: dict[str, Mode | None] = {
    "as trained": None,
    "literal": "literal",
    "linear": "linear",
}


class LoadFlexIP(io.ComfyNode):
    """A FlexIP adapter from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointLoadFlexIP",
            display_name="Load FlexIP Adapter",
            category="pinpoint/identity",
            description="Loads a FlexIP adapter of models/flexip, as Train FlexIP writes them.",
            search_aliases=["flexip loader", "subject adapter", "ip-adapter"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=adapter_files.names(),
                    tooltip="A file of models/flexip.",
                )
            ],
            outputs=[
                widgets.Adapter.Output(display_name="adapter", tooltip="For Apply FlexIP Adapter."),
                io.String.Output(
                    display_name="about",
                    tooltip="The model family and the image encoders that it needs.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str) -> str:
        """Another file by the same name is another adapter."""
        return tensor_files.fingerprint(tensor_files.path_of(adapter_files.folder, file_name))

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        adapter = adapter_files.load(file_name)
        progress.show(adapter.about)
        return io.NodeOutput(adapter, adapter.about, ui=ui.PreviewText(adapter.about))


class FlexIPGate(io.ComfyNode):
    """Gamma as a schedule, for groups of blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointFlexIPGate",
            display_name="FlexIP Gate",
            category="pinpoint/identity",
            description=(
                "Lets FlexIP's gamma change from noise to picture, and differ between blocks: 1 "
                "preserves the subject, 0 adapts it to the prompt."
            ),
            search_aliases=["gamma schedule", "weight type", "preservation"],
            inputs=[
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default="linear",
                    tooltip=(
                        "Constant stays at first; linear and cosine go from first to last; list "
                        "follows values."
                    ),
                ),
                widgets.part("first", 0.3, "Gamma at the first noise level."),
                widgets.part("last", 0.7, "Gamma at the picture."),
                io.String.Input(
                    "values",
                    default="0.3, 0.5, 0.7",
                    tooltip=(
                        "For list: gamma at equal distances from noise to picture, with commas."
                    ),
                ),
                widgets.blocks("all"),
                widgets.Gate.Input(
                    "others",
                    optional=True,
                    tooltip="Another FlexIP Gate, which counts for the blocks not named here.",
                ),
                io.Custom("CURVE").Input(
                    "curve",
                    optional=True,
                    tooltip="From Curve Editor: gamma from noise to picture, in place of shape.",
                ),
                # Some packs give lists of numbers as FLOATS, others as FLOAT.
                io.MultiType.Input(
                    "floats",
                    types=[io.Custom("FLOATS"), io.Float],
                    optional=True,
                    tooltip="A list of numbers from another node, in place of values and shape.",
                ),
            ],
            outputs=[
                widgets.Gate.Output(
                    display_name="gate", tooltip="For Apply FlexIP Adapter, or another gate."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        shape: str,
        first: float,
        last: float,
        values: str,
        blocks: str,
        others: Gate | None = None,
        curve: Any = None,
        floats: Any = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        schedule = gates.schedule(shape, first, last, values, curve, floats)
        return io.NodeOutput((others or Gate()).extended(blocks, schedule))


class ApplyFlexIP(io.ComfyNode):
    """A subject put into a model's attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointApplyFlexIP",
            display_name="Apply FlexIP Adapter",
            category="pinpoint/identity",
            description=(
                "Shows a model the subject of a reference picture, with one dial between keeping "
                "it as it is and adapting it to the prompt."
            ),
            search_aliases=["ip-adapter", "reference", "subject", "identity", "face", "flexip"],
            inputs=[
                io.Model.Input("model", tooltip="Of the family that the adapter was trained for."),
                widgets.Adapter.Input(
                    "adapter", tooltip="From Load FlexIP Adapter or IP-Adapter as Branches."
                ),
                widgets.Subject.Input("subject", tooltip="From Encode Subject."),
                widgets.part(
                    "gamma",
                    0.5,
                    "1 preserves the subject, 0 adapts it to the prompt. A connected gate replaces "
                    "it.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.01,
                    tooltip="How much the subject counts at all; at 0 the model is untouched.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(modes),
                    default="as trained",
                    tooltip=(
                        "Literal scales tokens and joins them, as the paper draws it; linear reads "
                        "each branch by itself and adds them by gamma."
                    ),
                ),
                widgets.part("start", 0.0, "Where it begins to act, 0 = noise."),
                widgets.part("end", 1.0, "Where it ceases to act, 1 = picture."),
                widgets.blocks("all"),
                widgets.Gate.Input(
                    "gate", optional=True, tooltip="From FlexIP Gate: gamma as a schedule."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject may act, 1 = inside. Without it, everywhere.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="For a guider or a sampler, or the next Apply FlexIP Adapter."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        adapter: Adapter,
        subject: Subject,
        gamma: float,
        weight: float,
        mode: str,
        start: float,
        end: float,
        blocks: str,
        gate: Gate | None = None,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        settings = adapting.Settings(
            weight=weight,
            gate=gate or gates.constant(gamma),
            mode=modes[mode] or adapter.mode,
            start=start,
            end=end,
            blocks=blocks,
            mask=mask,
        )
        return io.NodeOutput(adapting.applied(model, adapter, subject, settings))


nodes = [LoadFlexIP, ApplyFlexIP, FlexIPGate]
