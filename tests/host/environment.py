"""The pack's own virtual environment: made once, resumed when interrupted, known by a stamp."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import comfyui
from .pip_progress import PipProgress

ENVIRONMENT = comfyui.PACK / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# Installing the key's dependency group brings the values' groups with it.
GROUPS = {"demo": ("demo",), "test": ("demo", "test")}

# What pip says, and what a person can do about it; the first match counts.
CURES = (
    (
        r"No space left on device|Errno 28|not enough space on the disk",
        "The disk is full: the environment needs about 8 GB; free some and run the same command "
        "again, it goes on where it stopped",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "The download is not the file Pinpoint knows (its sha256 differs), so it was not used: "
        "check the package index in pip's configuration, or set COMFYUI_PATH to your own ComfyUI",
    ),
    (
        r"NewConnectionError|NameResolutionError|Max retries|[Tt]imed? ?out|getaddrinfo|"
        r"Temporary failure|ProxyError|SSLError|ConnectionResetError|Connection broken",
        "The Python package index could not be reached: check the network (a proxy goes into "
        "HTTPS_PROXY) and run the same command again, it goes on where it stopped",
    ),
    (
        r"No matching distribution found|Requires-Python|requires a different Python",
        f"A package has no build for Python {platform.python_version()} on {platform.machine()} "
        f"{platform.system()}: run run.py with Python 3.10 to 3.13",
    ),
)


class SetupError(Exception):
    """The environment could not be made; the message says why and what to do."""


def prepare(group: str) -> Path:
    """Make `.venv` complete for a group ("demo" or "test") and return ComfyUI's folder."""
    folder = comfyui.find()
    if folder and _is_complete(group, folder):
        return folder
    started = time.monotonic()
    _create()
    if folder is None:
        print(f"Fetching ComfyUI {comfyui.VERSION} into {comfyui.cached_copy()}", flush=True)
        folder = comfyui.download(pip)
    print(f"Installing ComfyUI's requirements and the {group} tools into .venv", flush=True)
    print("(the first time: several GB with PyTorch, some minutes)", flush=True)
    pip(
        [
            *("install", "--requirement", str(folder / "requirements.txt")),
            *("--group", f"{comfyui.PACK / 'pyproject.toml'}:{group}"),
        ]
    )
    for name in GROUPS[group]:
        _stamp(name).write_text(wanted(folder))
    print(f"Ready after {time.monotonic() - started:.0f} s", flush=True)
    return folder


def pip(arguments: Sequence[str]) -> None:
    """Run the environment's pip, telling its progress in few lines."""
    command = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    process = subprocess.Popen(
        [*command, *arguments, "--progress-bar", "raw"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_pip_environment(),
    )
    progress = PipProgress()
    try:
        progress.follow(process)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait():
        raise SetupError(explain(progress.tail))


def _create() -> None:
    """Make the virtual environment, or mend a half-made one, with a pip that knows groups."""
    if not _has_pip():
        if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
            raise SetupError(
                "This Python cannot make virtual environments because its venv module is not "
                "installed: on Debian or Ubuntu run 'sudo apt install python3-venv', then the "
                "same command again"
            )
        print(f"Making .venv with Python {platform.python_version()}", flush=True)
        # Clearing is only for environments whose Python is gone; others can be completed.
        clear = [] if PYTHON.exists() else ["--clear"]
        made = _run([sys.executable, "-m", "venv", *clear, str(ENVIRONMENT)])
        if made.returncode:
            raise SetupError(explain(made.stdout.splitlines()))
    # No progress options yet: the pip of an older Python does not know them.
    upgrade = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = _run([*upgrade, "pip>=25.1"])
    if done.returncode:
        raise SetupError(explain(done.stdout.splitlines()))


def _has_pip() -> bool:
    if not PYTHON.exists():
        return False
    return _run([str(PYTHON), "-m", "pip", "--version"]).returncode == 0


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_pip_environment(),
    )


def _pip_environment() -> dict[str, str]:
    # PIP_USER in a person's settings would make pip refuse to install into .venv.
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "PIP_USER": "0"}


def _is_complete(group: str, folder: Path) -> bool:
    stamp = _stamp(group)
    return PYTHON.exists() and stamp.is_file() and stamp.read_text() == wanted(folder)


def _stamp(group: str) -> Path:
    return ENVIRONMENT / f"pinpoint-{group}.sha256"


def wanted(folder: Path) -> str:
    """A hash of everything that decides what is installed."""
    # Python 3.10 has no TOML reader; the table's text is as good for telling a change.
    project = (comfyui.PACK / "pyproject.toml").read_text(encoding="utf-8")
    table = re.search(r"^\[dependency-groups\]\n.*?(?=^\[|\Z)", project, re.DOTALL | re.MULTILINE)
    assert table is not None, "pyproject.toml has no [dependency-groups]"
    requirements = (folder / "requirements.txt").read_text(encoding="utf-8")
    return hashlib.sha256(f"{table[0]}\n{requirements}".encode()).hexdigest()


def explain(output: Sequence[str]) -> str:
    """One sentence on a failed installation, above the last lines that say it in detail."""
    text = "\n".join(output)
    sentence = next(
        (cure for pattern, cure in CURES if re.search(pattern, text)),
        "The installation failed; the lines below say where. Running the same command again "
        "goes on where it stopped",
    )
    detail = "\n".join(f"    {line:.160}" for line in list(output)[-8:])
    return f"{sentence}.\n{detail}"
