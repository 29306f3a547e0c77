"""Workflows as methods: a case goes in, an edited picture comes out of a ComfyUI server."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_cli.workflow_to_api import WorkflowConversionError
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
        graph = _graph(client, file)
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
    ) -> tuple[Image.Image, float | None]:
        """The edited picture and the seconds that it took; None if the server had it already.

        Raises:
            BadCase: the workflow saves another number of pictures than one, or needs a text that
                the case has not.
            PromptRejected, PromptFailed, PromptInterrupted, PromptTimedOut: as the server says.
        """
        name = uploaded(client, source)
        graph = copy.deepcopy(self.graph)
        told = places.Case(source, case.source_prompt, case.target_prompt, case.instruction)
        try:
            fill_in(graph, told, name, seed, strict=True)
        except CaseError as error:
            raise BadCase(f"{self.name}: {error}") from None
        started = time.monotonic()
        prompt_id = client.queue(graph)
        outputs = client.wait(prompt_id, timeout=timeout)
        saved = outputs.get(self.saver, {}).get("images", [])
        elapsed = time.monotonic() - started
        if len(saved) != 1:
            raise BadCase(f"{self.name} saves {len(saved)} pictures: a case needs one")
        picture = Image.open(io.BytesIO(client.view(**saved[0]))).convert("RGB")
        return picture, _seconds(client.history(prompt_id), graph, elapsed)


def _graph(client: Client, file: Path) -> Graph:
    """A workflow as servers execute it, of any file that ComfyUI writes."""
    try:
        said = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ProtocolError(
            f"{file} cannot be read ({error}): name a workflow that ComfyUI has saved"
        ) from None
    if isinstance(said, dict) and isinstance(said.get("prompt"), dict):
        said = said["prompt"]
    if isinstance(said, dict) and "nodes" in said:
        try:
            said = client.convert(said)
        except WorkflowConversionError as error:
            raise ProtocolError(
                f"{file} cannot be converted ({error}): save it in ComfyUI with Export (API)"
            ) from None
    if not (isinstance(said, dict) and said and all(map(_is_node, said.values()))):
        raise ProtocolError(f"{file} is no workflow: save it in ComfyUI with Export (API)")
    for node in said.values():
        node.setdefault("_meta", {}).setdefault("title", "")
    return said


def _is_node(said: Any) -> bool:
    return isinstance(said, dict) and "class_type" in said and isinstance(said.get("inputs"), dict)


def uploaded(client: Client, picture: Image.Image) -> str:
    """Put a picture into the server's input folder, under a name that no other picture has."""
    content = places.png(picture)
    name = f"pinpoint_protocol_{hashlib.sha256(content).hexdigest()[:16]}.png"
    return client.upload_image(name, content)


def _seconds(history: Mapping[str, Any], graph: Graph, elapsed: float) -> float | None:
    """What a prompt took by the server's clock, or `elapsed`; None if nothing had to be run."""
    said = dict(history.get("status", {}).get("messages", ()))
    if graph.keys() <= set(said.get("execution_cached", {}).get("nodes", ())):
        return None
    times = [said.get(name, {}).get("timestamp") for name in _ends]
    return elapsed if None in times else (times[1] - times[0]) / 1000


_ends = ("execution_start", "execution_success")
