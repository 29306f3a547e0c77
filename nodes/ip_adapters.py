"""Who is in the picture, by the adapters that people have: IP-Adapter files."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .host import arguments, ip_adapter_files, progress, tensor_files, widgets


class IPAdapterBranches(io.ComfyNode):
    """Two IP-Adapter files as one adapter with a gate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = ip_adapter_files.names()
        return io.Schema(
            node_id="PinpointIPAdapterBranches",
            display_name="IP-Adapter as Branches",
            category="pinpoint/identity",
            description=(
                "Makes one adapter of two public IP-Adapter files for SD1.5 or SDXL: gamma then "
                "moves from the one that preserves to the one that adapts."
            ),
            search_aliases=["ipadapter", "ip adapter loader", "flexip", "reference", "subject"],
            inputs=[
                io.Combo.Input(
                    "preservation",
                    options=names,
                    tooltip=(
                        "A file of models/ipadapter that acts at gamma 1: one that sees details, "
                        "such as ip-adapter-plus."
                    ),
                ),
                io.Combo.Input(
                    "personalization",
                    options=names,
                    tooltip=(
                        "The file that acts at gamma 0: one that leaves the prompt more room, such "
                        "as the global ip-adapter; may be the same."
                    ),
                ),
            ],
            outputs=[
                widgets.Adapter.Output(display_name="adapter", tooltip="For Apply FlexIP Adapter."),
                io.String.Output(
                    display_name="about",
                    tooltip="The model family, and what each file reads of the image encoder.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, preservation: str, personalization: str) -> str:
        """Other files by the same names are another adapter."""
        files = preservation, personalization
        return " ".join(
            tensor_files.fingerprint(tensor_files.path_of(ip_adapter_files.folder, name))
            for name in files
        )

    @classmethod
    def execute(cls, preservation: str, personalization: str) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        adapter = ip_adapter_files.load(preservation, personalization)
        progress.show(adapter.about)
        return io.NodeOutput(adapter, adapter.about, ui=ui.PreviewText(adapter.about))


nodes = [IPAdapterBranches]
