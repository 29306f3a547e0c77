"""A client of a ComfyUI server: uploads, queues prompts, waits for them, fetches pictures."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any

import requests
import websocket

from .prompts import FAILURES, Graph, Outputs, PromptRejected

Progress = Callable[[str, float], None]
Event = tuple[str, dict[str, Any]]


class ServerError(Exception):
    """The server did not start, died or did not answer in time."""


class Client:
    """Talks to a running ComfyUI; use it as a context manager.

    Any number of prompts may be in flight, and several threads may wait for them.

    Attributes:
        address: such as http://127.0.0.1:8188.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._client = str(uuid.uuid4())
        self._socket: websocket.WebSocket | None = None
        self._events: dict[str, queue.SimpleQueue[Event]] = defaultdict(queue.SimpleQueue)
        self._lock = threading.Lock()
        self._http = requests.Session()
        # A proxy in the environment is not for this machine's own addresses.
        self._http.trust_env = False

    def __enter__(self) -> Client:
        self._connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; calling it again does nothing."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def last_words(self) -> str:
        """What is known of a server that does not answer any more, as the end of a sentence."""
        return f": look at the log of {self.address}, and start it again"

    def get(self, path: str, **query: Any) -> requests.Response:
        """GET a path; the answer's status is not checked."""
        return self._http.get(self.address + path, params=query, timeout=60)

    def object_info(self) -> dict[str, Any]:
        """Every node's inputs and outputs, as the web page gets them."""
        return self._json("/object_info")

    def convert(self, workflow: dict[str, Any]) -> Graph:
        """A workflow as the web page saves it, in the form that the server executes."""
        from comfy_cli.workflow_to_api import convert_ui_to_api

        return convert_ui_to_api(workflow, self.object_info())

    def queue(self, graph: Graph, extra_data: dict[str, Any] | None = None) -> str:
        """Queue a prompt and return its id; raises PromptRejected when it does not validate."""
        body = {"prompt": graph, "client_id": self._client, "extra_data": extra_data or {}}
        answer = self._http.post(f"{self.address}/prompt", json=body, timeout=60)
        if answer.status_code == 400:
            problem = answer.json()
            raise PromptRejected(problem["error"], problem["node_errors"])
        answer.raise_for_status()
        # ComfyUI takes a prompt when any of its outputs validates, and leaves out the others.
        if answer.json()["node_errors"]:
            self.interrupt(answer.json()["prompt_id"])
            raise PromptRejected({}, answer.json()["node_errors"])
        prompt_id: str = answer.json()["prompt_id"]
        with self._lock:
            self._events[prompt_id]  # known from now on to the thread that reports a lost server
        return prompt_id

    def wait(
        self, prompt_id: str, on_progress: Progress | None = None, timeout: float = 600
    ) -> Outputs:
        """Wait for a queued prompt and return its nodes' outputs by node id.

        `on_progress` is called with a running node's id and the done part of its work, 0 to 1.
        Raises PromptFailed or PromptInterrupted.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            events = self._events[prompt_id]
        failure: Exception | None = None
        while True:
            try:
                event, data = events.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise ServerError(f"Prompt {prompt_id} took longer than {timeout:.0f} s") from None
            if event == "connection_lost":
                raise ServerError(f"ComfyUI stopped answering{self.last_words()}")
            if event == "progress_state" and on_progress:
                _tell(on_progress, data["nodes"])
            if event in FAILURES:
                failure = FAILURES[event](data)
            # The last message of a prompt, sent when its history can be read.
            if event == "executing" and data["node"] is None:
                if failure:
                    raise failure
                return self.history(prompt_id)["outputs"]

    def run(
        self, graph: Graph, on_progress: Progress | None = None, timeout: float = 600
    ) -> Outputs:
        """Queue a prompt, wait for it and return its outputs."""
        return self.wait(self.queue(graph), on_progress, timeout)

    def history(self, prompt_id: str) -> dict[str, Any]:
        """A finished prompt's outputs and status messages."""
        return self._json(f"/history/{prompt_id}")[prompt_id]

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Interrupt the running prompt, or the named one if it is running."""
        body = {"prompt_id": prompt_id} if prompt_id else {}
        self._http.post(f"{self.address}/interrupt", json=body, timeout=60).raise_for_status()

    def upload_image(self, name: str, content: bytes) -> str:
        """Put a picture into the input folder and return the name a LoadImage node takes."""
        answer = self._http.post(
            f"{self.address}/upload/image",
            files={"image": (name, content)},
            data={"overwrite": "true"},
            timeout=60,
        )
        answer.raise_for_status()
        return answer.json()["name"]

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """A picture's bytes; an entry of `outputs[node]["images"]` gives the arguments."""
        answer = self.get("/view", filename=filename, subfolder=subfolder, type=type)
        answer.raise_for_status()
        return answer.content

    def _json(self, path: str) -> dict[str, Any]:
        answer = self.get(path)
        answer.raise_for_status()
        return answer.json()

    def _connect(self) -> None:
        address = self.address.replace("http", "ws", 1)
        try:
            self._socket = websocket.create_connection(
                f"{address}/ws?clientId={self._client}", timeout=60
            )
        except (OSError, websocket.WebSocketException) as error:
            raise ServerError(
                f"No ComfyUI answers at {self.address} ({error}): start it, or correct the address"
            ) from error
        # ComfyUI remembers who asked for a prompt only if it knows the client by then, which its
        # first message confirms.
        self._socket.recv()
        self._socket.settimeout(None)
        threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    def _listen(self, connection: websocket.WebSocket) -> None:
        """Sort the server's messages by prompt, until the connection ends."""
        with contextlib.suppress(OSError, websocket.WebSocketException):
            while True:
                message = connection.recv()
                if not message:
                    break
                # Binary messages are previews, which nobody here looks at.
                if isinstance(message, str):
                    self._sort(json.loads(message))
        with self._lock:
            for events in self._events.values():
                events.put(("connection_lost", {}))

    def _sort(self, message: dict[str, Any]) -> None:
        prompt_id = message["data"].get("prompt_id")
        if prompt_id:
            with self._lock:
                self._events[prompt_id].put((message["type"], message["data"]))


def _tell(on_progress: Progress, nodes: dict[str, dict[str, Any]]) -> None:
    for node in nodes.values():
        if node["state"] == "running":
            on_progress(node["real_node_id"], node["value"] / max(node["max"], 1))
