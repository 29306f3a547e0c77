"""ComfyUI inside the current process: its nodes, its loader, its executor, but no server loop."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from . import comfyui, launch
from .base import NAME
from .prompts import FAILURES, Graph, Outputs, PromptRejected


@dataclass(frozen=True)
class Execution:
    """What a prompt left behind."""

    outputs: Outputs
    """What output nodes showed, by node id."""
    cached: list[str]
    """Ids of the nodes that were not run because their results were known."""
    _executor: Any = field(repr=False)

    def value(self, node_id: str, slot: int = 0) -> Any:
        """The object a node returned in an output slot, such as a LATENT or an IMAGE."""
        (value,) = self._executor.caches.outputs.get_local(node_id).outputs[slot]
        return value


class _Listener:
    """As much of a PromptServer as the executor talks to."""

    client_id: str | None = None
    last_node_id: str | None = None
    last_prompt_id: str | None = None

    def __init__(self) -> None:
        self.sockets_metadata: dict[str, Any] = {}

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        pass


class Host:
    """A ComfyUI in this process; `start` makes the only one there can be."""

    def __init__(self, base: Path, nodes: dict[str, type], pack: ModuleType) -> None:
        self.base = base
        self.nodes = nodes
        """Every loaded node class by its id (NODE_CLASS_MAPPINGS)."""
        self.pack = pack
        """Pinpoint, as ComfyUI's own loader imported it."""

    def new_executor(self) -> Any:
        """A PromptExecutor with an empty cache, to be given to several `execute` calls."""
        import execution

        return execution.PromptExecutor(
            _Listener(),
            cache_type=execution.CacheType.CLASSIC,
            cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0},
        )

    def execute(self, graph: Graph, executor: Any = None) -> Execution:
        """Validate and run a graph; a kept executor brings its cache along.

        Raises PromptRejected, PromptFailed or PromptInterrupted, as the server's client does.
        """
        import execution

        prompt_id = str(uuid.uuid4())
        valid, error, output_nodes, node_errors = asyncio.run(
            execution.validate_prompt(prompt_id, graph, None)
        )
        if not valid:
            raise PromptRejected(error or {}, node_errors)
        executor = executor or self.new_executor()
        executor.execute(graph, prompt_id, {"client_id": "tests"}, output_nodes)
        messages = executor.status_messages
        for event, data in messages:
            if event in FAILURES:
                raise FAILURES[event](data)
        (cached,) = (data["nodes"] for event, data in messages if event == "execution_cached")
        return Execution(executor.history_result["outputs"], cached, executor)


_host: Host | None = None


def start(base: Path, cpu: bool | None = None, more: Sequence[str] = ()) -> Host:
    """Start ComfyUI in this process, once; later calls return the same host.

    `base` is a folder made by `host.base.make_base`, `more` are arguments of ComfyUI's command
    line. Takes about ten seconds.
    """
    global _host  # noqa: PLW0603
    if _host is None:
        _host = _start(base.absolute(), cpu, more)
    elif _host.base != base.absolute():
        raise RuntimeError(f"ComfyUI already runs in this process on {_host.base}, not on {base}")
    elif more:
        raise RuntimeError(f"ComfyUI already runs in this process, without {' '.join(more)}")
    return _host


def prepare(arguments: Sequence[str]) -> None:
    """Make ComfyUI's modules importable, with its command-line arguments read, starting nothing."""
    # ComfyUI's modules have names like `nodes` and `utils`: its folder has to come first.
    sys.path.insert(0, str(comfyui.locate()))
    import comfy.options

    # ComfyUI reads its arguments on import of comfy.cli_args, if it has been told to.
    own_arguments = sys.argv
    sys.argv = [own_arguments[0], *arguments]
    comfy.options.enable_args_parsing()
    try:
        import comfy.cli_args
    finally:
        sys.argv = own_arguments


def _start(base: Path, cpu: bool | None, more: Sequence[str]) -> Host:
    prepare([*launch.arguments(base, cpu), *more])
    # To a type checker, a plain import of `nodes` would be of our own.
    nodes: Any = importlib.import_module("nodes")
    server: Any = importlib.import_module("server")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    # Packs register routes and node replacements on PromptServer.instance while they load.
    server.PromptServer(loop)
    warnings = _Warnings()
    logging.getLogger().addHandler(warnings)
    try:
        loop.run_until_complete(
            nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False)
        )
    finally:
        logging.getLogger().removeHandler(warnings)
    origin = f"custom_nodes.{NAME}"
    loaded = nodes.NODE_CLASS_MAPPINGS
    if not any(getattr(node, "RELATIVE_PYTHON_MODULE", "") == origin for node in loaded.values()):
        raise RuntimeError("ComfyUI did not load the pack:\n" + "\n".join(warnings.messages))
    # The name under which ComfyUI's loader puts a pack into sys.modules.
    pack = sys.modules[str(base / "custom_nodes" / NAME).replace(".", "_x_")]
    return Host(base, loaded, pack)


class _Warnings(logging.Handler):
    """Keeps the warnings logged while packs load; a failed import is nothing more than that."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
