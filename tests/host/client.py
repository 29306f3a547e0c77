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


class PromptTimedOut(ServerError):
    """A prompt took too long, and was cancelled."""


class Client:
    """Talks to a running ComfyUI; use it as a context manager.

    Any number of prompts may be in flight, and several threads may wait for them.

    Attributes:
        address: such as http://127.0.0.1:8188; http:// may be left out.
    """

    _reconnects: tuple[float, ...] = (1, 2, 5, 10)
    """Seconds to wait before each new attempt to reach a server that was lost."""
    _silence = 10.0
    """Seconds without a message after which a prompt is asked for, as a socket may die unseen."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
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
        # In this order: who listens tells from it that the end is wanted.
        connection, self._socket = self._socket, None
        if connection:
            connection.close()

    def last_words(self) -> str:
        """What is known of a server that does not answer any more, as the end of a sentence."""
        return f": look at the log of {self.address}, and start it again"

    def get(self, path: str, **query: Any) -> requests.Response:
        """GET a path; the answer's status is not checked."""
        return self._asked("GET", path, params=query)

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
        answer = self._asked("POST", "/prompt", json=body)
        if answer.status_code == 400:
            problem = answer.json()
            raise PromptRejected(problem["error"], problem["node_errors"])
        found = _good(answer).json()
        # ComfyUI takes a prompt when any of its outputs validates, and leaves out the others.
        if found["node_errors"]:
            self.cancel(found["prompt_id"])
            raise PromptRejected({}, found["node_errors"])
        prompt_id: str = found["prompt_id"]
        with self._lock:
            self._events[prompt_id]  # known from now on to the thread that reports a lost server
        return prompt_id

    def wait(
        self, prompt_id: str, on_progress: Progress | None = None, timeout: float = 600
    ) -> Outputs:
        """Wait for a queued prompt and return its nodes' outputs by node id.

        It is cancelled when it takes longer than `timeout` seconds, and at Ctrl-C. `on_progress` is
        called with a running node's id and the done part of its work, 0 to 1.

        Raises:
            PromptFailed, PromptInterrupted: as the server says.
            PromptTimedOut: it took longer.
            ServerError: the server is gone, or was started anew.
        """
        try:
            return self._outputs(self._finished(prompt_id, on_progress, timeout))
        except (KeyboardInterrupt, PromptTimedOut):
            with contextlib.suppress(ServerError):
                self.cancel(prompt_id)
            raise

    def _finished(
        self, prompt_id: str, on_progress: Progress | None, timeout: float
    ) -> dict[str, Any]:
        """The history of a prompt, as soon as there is one."""
        deadline = time.monotonic() + timeout
        with self._lock:
            events = self._events[prompt_id]
        while (left := deadline - time.monotonic()) > 0:
            try:
                event, data = events.get(timeout=min(left, self._silence))
            except queue.Empty:
                event, data = "silence", {}
            if event == "connection_lost":
                raise ServerError(f"ComfyUI stopped answering{self.last_words()}")
            if event == "progress_state" and on_progress:
                _tell(on_progress, data["nodes"])
            # The last message of a prompt, sent when its history can be read.
            done = event == "executing" and data["node"] is None
            if (done or event in ("silence", "reconnected")) and (found := self._known(prompt_id)):
                return found
        raise PromptTimedOut(f"Prompt {prompt_id} took longer than {timeout:.0f} s")

    def _known(self, prompt_id: str) -> dict[str, Any] | None:
        """The history of a prompt; None while it is in the queue."""
        # In this order: a prompt leaves the queue when it enters the history.
        queued = prompt_id in self._queued("queue_pending") | self._queued("queue_running")
        found = self._json(f"/history/{prompt_id}").get(prompt_id)
        if not (found or queued):
            raise ServerError(
                f"{self.address} does not know prompt {prompt_id} any more: it was started anew, "
                "or somebody cleared its queue"
            )
        return found

    def _queued(self, part: str) -> set[str]:
        return {entry[1] for entry in self._json("/queue")[part]}

    @staticmethod
    def _outputs(history: dict[str, Any]) -> Outputs:
        """What a finished prompt has made; raises what it failed of."""
        for event, data in history["status"]["messages"]:
            if event in FAILURES:
                raise FAILURES[event](data)
        return history["outputs"]

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
        _good(self._asked("POST", "/interrupt", json=body))

    def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or interrupt it if it is running."""
        _good(self._asked("POST", "/queue", json={"delete": [prompt_id]}))
        # Servers of before 2025 interrupt whatever runs.
        if prompt_id in self._queued("queue_running"):
            self.interrupt(prompt_id)

    def upload_image(self, name: str, content: bytes) -> str:
        """Put a picture into the input folder and return the name a LoadImage node takes."""
        answer = self._asked(
            "POST",
            "/upload/image",
            files={"image": (name, content)},
            data={"overwrite": "true"},
        )
        return _good(answer).json()["name"]

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """A picture's bytes; an entry of `outputs[node]["images"]` gives the arguments."""
        return _good(self.get("/view", filename=filename, subfolder=subfolder, type=type)).content

    def _json(self, path: str) -> dict[str, Any]:
        answer = _good(self.get(path))
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(
                f"{answer.url} answered no JSON ({error}): correct the address of ComfyUI"
            ) from error

    def _asked(self, method: str, path: str, **what: Any) -> requests.Response:
        """An answer of any status; raises ServerError when there is none.

        A GET, which changes nothing, is tried again like a lost connection.
        """
        waits = iter(self._reconnects if method == "GET" else ())
        while True:
            try:
                return self._http.request(method, self.address + path, timeout=60, **what)
            except requests.RequestException as error:
                seconds = next(waits, None)
                if seconds is None:
                    raise ServerError(
                        f"{self.address}{path} does not answer ({error}){self.last_words()}"
                    ) from error
            time.sleep(seconds)

    def _connect(self) -> None:
        self._socket = self._opened()
        threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    def _opened(self) -> websocket.WebSocket:
        address = self.address.replace("http", "ws", 1)
        try:
            found = websocket.create_connection(f"{address}/ws?clientId={self._client}", timeout=60)
            # ComfyUI remembers who asked for a prompt only if it knows the client by then, which
            # its first message confirms.
            found.recv()
        except (OSError, ValueError, websocket.WebSocketException) as error:
            raise ServerError(
                f"No ComfyUI answers at {self.address} ({error}): start it, or correct the address"
            ) from error
        found.settimeout(None)
        return found

    def _listen(self, connection: websocket.WebSocket | None) -> None:
        """Sort the server's messages by prompt, until the connection ends for good."""
        while connection:
            with contextlib.suppress(OSError, websocket.WebSocketException):
                # An empty message is a connection that was closed.
                while message := connection.recv():
                    # Binary messages are previews, which nobody here looks at.
                    if isinstance(message, str):
                        self._sort(json.loads(message))
            connection = self._reconnected(connection)
            self._tell_all("reconnected" if connection else "connection_lost")

    def _reconnected(self, lost: websocket.WebSocket) -> websocket.WebSocket | None:
        """A new connection; None if there is none to be had, or `close` was called."""
        for seconds in self._reconnects:
            if self._socket is not lost:
                return None
            time.sleep(seconds)
            with contextlib.suppress(ServerError):
                found = self._opened()
                if self._socket is lost:
                    self._socket = found
                    return found
                found.close()
        return None

    def _tell_all(self, event: str) -> None:
        with self._lock:
            for events in self._events.values():
                events.put((event, {}))

    def _sort(self, message: dict[str, Any]) -> None:
        prompt_id = message["data"].get("prompt_id")
        if prompt_id:
            with self._lock:
                self._events[prompt_id].put((message["type"], message["data"]))


def _good(answer: requests.Response) -> requests.Response:
    """The answer; raises ServerError if the server refused."""
    if not answer.ok:
        raise ServerError(
            f"{answer.url} answered {answer.status_code} {answer.reason}: {answer.text[:300]}"
        )
    return answer


def _tell(on_progress: Progress, nodes: dict[str, dict[str, Any]]) -> None:
    for node in nodes.values():
        if node["state"] == "running":
            on_progress(node["real_node_id"], node["value"] / max(node["max"], 1))
