"""Pinpoint: local, text-driven image editing for ComfyUI."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .nodes import all_nodes
from .nodes.host import adapter_files, identity_files, lpips_nets, tensor_files

WEB_DIRECTORY = "./web"


class PinpointExtension(ComfyExtension):
    """What ComfyUI asks about the pack."""

    @override
    async def on_load(self) -> None:
        """Make the pack's model folders known."""
        for module in (identity_files, adapter_files, lpips_nets):
            tensor_files.register_folder(module.folder)

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return all_nodes


async def comfy_entrypoint() -> PinpointExtension:
    """ComfyUI's entry into the pack."""
    return PinpointExtension()
