"""Workflows as methods: a case goes in, an edited picture comes out of a ComfyUI server."""

from __future__ import annotations

import copy
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from host import cases as places
from host.client import Client
from host.filling import CaseError, fill_in
from host.prompts import Graph

from .cases import BadCase, Case, ProtocolError

_edit = "pinpoint/edit"
"""Prefix of the picture that counts, in workflows that save several."""


@dataclass(frozen=True)
class Method:
    """A workflow in the form that servers execute, and the node that saves its edit."""

    name: str
    graph: Graph
    saver: str

    @classmethod
    def of(cls, client: Client, file: Path) -> Method:
        """Read a workflow, saved either way.

        Raises:
            ProtocolError: it is no workflow, it is not clear which picture is the edit, or it has
                no place for the picture, the prompts or the seed.
        """
        try:
            said = json.loads(file.read_text("utf-8"))
            graph = client.convert(said) if "nodes" in said else said
        except (OSError, ValueError) as error:
            raise ProtocolError(f"{file} cannot be read as a workflow ({error})") from None
        for node in graph.values():
            node.setdefault("_meta", {}).setdefault("title", "")
        savers = [key for key, node in graph.items() if node["class_type"] == "SaveImage"]
        named = [key for key in savers if graph[key]["inputs"].get("filename_prefix") == _edit]
        if len(named or savers) != 1:
            raise ProtocolError(
                f"{file} saves {len(savers)} pictures: give the edit's Save Image the "
                f"filename_prefix {_edit}"
            )
        method = cls(file.stem, graph, *(named or savers))
        method._try_on()
        return method

    def _try_on(self) -> None:
        """Fill in a case that has everything, so that what is missing is said before a run."""
        whole = places.Case(Image.new("RGB", (1, 1)), "source", "target", "instruction")
        try:
            fill_in(copy.deepcopy(self.graph), whole, "picture.png", 0, strict=True)
        except CaseError as error:
            raise ProtocolError(f"{self.name}: {error}") from None

    def edit(
        self, client: Client, case: Case, source: Image.Image, seed: int, timeout: float
    ) -> tuple[Image.Image, float]:
        """The edited picture and the seconds that it took.

        Raises:
            BadCase: the workflow saves another number of pictures than one, or needs a text that
                the case has not.
            PromptRejected, PromptFailed, PromptInterrupted: as the server says.
        """
        (name,) = places.upload(client, {"pinpoint_protocol.png": source})
        graph = copy.deepcopy(self.graph)
        told = places.Case(source, case.source_prompt, case.target_prompt, case.instruction)
        try:
            fill_in(graph, told, name, seed, strict=True)
        except CaseError as error:
            raise BadCase(f"{self.name}: {error}") from None
        started = time.monotonic()
        outputs = client.run(graph, timeout=timeout)
        seconds = time.monotonic() - started
        saved = outputs[self.saver]["images"]
        if len(saved) != 1:
            raise BadCase(f"{self.name} saves {len(saved)} pictures: a case needs one")
        return Image.open(io.BytesIO(client.view(**saved[0]))).convert("RGB"), seconds
