"""A real ComfyUI server in a subprocess."""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import comfyui, launch
from .client import Client, ServerError


def free_port(preferred: int = 0) -> int:
    """The preferred port of this machine or, where that is taken, the next free one."""
    for port in range(preferred, preferred + 100) if preferred else [0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise ServerError(f"No free port from {preferred} to {preferred + 99}: name another --port")


class Server(Client):
    """A ComfyUI of one's own and its client; use it as a context manager.

    `base` is a folder made by `host.base.make_base`. ComfyUI's log goes into `comfyui.log` there.
    """

    # One's own hangs up only when it has died, and that is noticed at once.
    _reconnects = ()
    _silence = math.inf

    def __init__(
        self,
        base: Path,
        *,
        port: int | None = None,
        cpu: bool | None = None,
        arguments: Sequence[str] = (),
        start_timeout: float = 180,
    ) -> None:
        self.base = base
        self.port = port or free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.log = base / "comfyui.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [
            *(sys.executable, str(comfyui.locate() / "main.py")),
            *("--port", str(self.port), "--dont-print-server"),
            *launch.arguments(base, cpu),
            *arguments,
        ]
        self._start_timeout = start_timeout

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop the server; calling it again does nothing."""
        super().close()
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def last_words(self) -> str:
        """The end of the log."""
        return f"; its log ends:\n{self.log_tail()}"

    def log_tail(self, lines: int = 30) -> str:
        """The end of ComfyUI's log."""
        return "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-lines:])

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(
                    f"ComfyUI ended with code {self.process.returncode} while starting"
                    f"{self.last_words()}"
                )
            with contextlib.suppress(ServerError):
                if self.get("/system_stats").ok:
                    return
            time.sleep(0.2)
        raise ServerError(
            f"ComfyUI was not ready after {self._start_timeout:.0f} s{self.last_words()}"
        )
