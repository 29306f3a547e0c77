"""Turns pip's output into the few lines a waiting person wants."""

from __future__ import annotations

import queue
import re
import subprocess
import threading
import time
from collections import deque

MEGABYTE = 1_000_000
LARGE = 50 * MEGABYTE
PATIENCE_S = 10.0


class PipProgress:
    """Follows a pip that runs with `--progress-bar raw`: names large downloads and, when nothing
    was said for a while, what pip is at. `tail` keeps its last lines for an error message."""

    def __init__(self) -> None:
        self.tail: deque[str] = deque(maxlen=60)
        self._doing = "starting"
        self._package = ""
        self._announced = ""
        self._said_at = time.monotonic()

    def follow(self, process: subprocess.Popen[str]) -> None:
        """Read the process's output to its end."""
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                line = ""
            if line is None:
                return
            if line.strip():
                self._read(line.rstrip())
            if time.monotonic() - self._said_at > PATIENCE_S:
                self._say(self._doing)

    def _read(self, line: str) -> None:
        if share := re.match(r"Progress (\d+) of (\d+)", line):
            done, total = (int(number) for number in share.groups())
            if total >= LARGE and self._announced != self._package:
                self._announced = self._package
                self._say(f"downloading {self._package}, {total // MEGABYTE} MB")
            share_done = f"{self._package}: {done / max(total, 1):.0%}"
            self._doing = share_done if done < total else "looking up more"
            return
        self.tail.append(line)
        if wheel := re.match(r"\s*Downloading (?:\S+/)?([\w.]+)-", line):
            self._package = wheel[1]
        elif package := re.match(r"Collecting (\S+)", line):
            self._doing = f"looking up {package[1]}"
        elif found := re.match(r"Installing collected packages: (.+)", line):
            self._doing = "still unpacking"
            self._say(f"unpacking {found[1].count(',') + 1} packages")

    def _say(self, message: str) -> None:
        print(f"  {message}", flush=True)
        self._said_at = time.monotonic()


def _pump(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)
