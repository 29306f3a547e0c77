"""A published evaluation protocol on a ComfyUI server, one row a case, with an HTML page.

    python tests/bench/protocol.py pie-bench FOLDER --workflow my_edit.json \\
        --server http://127.0.0.1:8188 --lpips squeeze --dino dinov2.safetensors \\
        --clip clip-vit-large-patch14.safetensors --clip-vision clip-vit-large-patch14.safetensors

Layouts: pie-bench (its folder with mapping_file.json), focusflow (a YAML file of cases), portraits
(a folder with portraits.json) and subjects (DreamBench's dataset folder). Without a folder, drawn
portraits are written in that layout, and the shipped models and workflows edit them on a server of
one's own. A workflow is a method, with nodes titled "Target prompt" (and "Source prompt" or
"Instruction") and a seed; of several Load Image, the one titled "Source picture" gets the picture.
A row is kept as soon as it is made: the same command goes on after an interruption, other cases,
workflows or judges add only what is missing, and errors are rows until --retry.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from host.base import make_base
from host.client import Client, ServerError
from host.comfyui import ComfyUINotFound
from host.options import WORKFLOWS
from host.prompts import PromptRejected
from host.server import Server
from protocols import drawn, judging, report
from protocols.cases import Protocol, ProtocolError
from protocols.judging import Judges
from protocols.layouts import LAYOUTS
from protocols.running import Method
from protocols.runs import Run
from protocols.store import Store

shipped = {
    "pie-bench": ("focusflow", "flowedit", "sdedit"),
    "focusflow": ("focusflow", "flowedit", "sdedit"),
    "portraits": ("flux_sculptor", "rf_edit", "flowedit"),
    "subjects": ("flexip_subject",),
}
"""The demo workflows that each protocol runs if none is named."""
demo_judges = Judges(dino="pinpoint_dino.safetensors", identity="pinpoint_dino.safetensors")
"""What ships and can judge: there is no CLIP that knows the portraits' words."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("data", nargs="?", type=Path, help="drawn portraits if left out")
    parser.add_argument("--workflow", type=Path, action="append", help="a method; may be repeated")
    parser.add_argument("--server", metavar="URL", help="a running ComfyUI with Pinpoint")
    parser.add_argument("--count", type=int, help="the first cases only, or how many are drawn")
    parser.add_argument("--seed", type=int, default=1, help="of the noise, and of drawn portraits")
    parser.add_argument("--size", type=int, help="the longer side that pictures are scaled to")
    parser.add_argument("--output", type=Path, help="a folder (output/LAYOUT)")
    parser.add_argument(
        "--timeout", type=float, default=3600, help="seconds for one edit, or for its scores"
    )
    parser.add_argument("--retry", action="store_true", help="try cases again that failed")
    for name in Judges.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", default="", help=_judge_help[name])
    given = parser.parse_intermixed_args()
    if given.count is not None and given.count < 1:
        parser.error(f"--count {given.count}: it has to be at least 1")
    given.output = given.output or Path("output") / given.layout
    return given


_judge_help = {
    "lpips": "alex, vgg or squeeze; its backbone lies in the server's models/lpips",
    "clip": "a file of models/text_encoders with text projection",
    "clip_vision": "a file of models/clip_vision, of the same CLIP",
    "dino": "a DINOv2 of models/clip_vision",
    "identity": "an encoder of models/clip_vision that tells people apart",
}


def protocol_of(given: argparse.Namespace) -> Protocol:
    """The cases, drawn first if there are none."""
    data = given.data
    if data is None:
        # Of each seed and number apart: another run may still need what it drew.
        count = given.count or 20
        folder = given.output / "data" / f"seed{given.seed}_{count}"
        data = drawn.WRITERS[given.layout](folder, given.seed, count)
    found = LAYOUTS[given.layout](data)
    if not found.cases:
        raise ProtocolError(f"{data} has no cases: name the folder or file of a protocol's data")
    return replace(found, cases=found.cases[: given.count])


def methods_of(given: argparse.Namespace) -> list[Path]:
    """The files of workflows.

    Raises:
        ProtocolError: two have one name, which their rows could not be told apart by.
    """
    files = given.workflow or [WORKFLOWS / f"{name}.json" for name in shipped[given.layout]]
    named: dict[str, Path] = {}
    for file in files:
        if file.stem in named:
            raise ProtocolError(
                f"--workflow {named[file.stem]} and {file} have one name: rename one of them"
            )
        named[file.stem] = file
    return files


@contextmanager
def connected(given: argparse.Namespace) -> Iterator[Client]:
    """The server that was named, or one of our own with the shipped models."""
    if given.server:
        with Client(given.server) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="pinpoint-protocol-") as folder:
        print("Starting ComfyUI", flush=True)
        with Server(make_base(Path(folder))) as server:
            yield server


def judges_of(given: argparse.Namespace) -> Judges:
    """The networks that were named; of a server of our own, those that ship."""
    named = Judges(**{name: getattr(given, name) for name in Judges.__dataclass_fields__})
    return demo_judges if not given.server and named == Judges() else named


def run_on(client: Client, given: argparse.Namespace, protocol: Protocol) -> None:
    """Edit and score what is missing, and report what there is, also when this is stopped."""
    judges = judges_of(given)
    judging.require(judges, client.object_info())
    methods = [Method.of(client, file) for file in methods_of(given)]
    store = Store(given.output)
    if given.retry:
        store.forget_errors("edits")
        store.forget_errors("scores")
    run = Run(protocol, store, judges, given.seed, given.size, given.timeout)
    jobs = run.jobs(methods)
    try:
        run.edit(client, jobs)
        run.score(client, jobs)
    finally:
        report.write(run, jobs, shlex.join(["python", *sys.argv]))


def main() -> int:
    """Run a protocol, or go on with it."""
    given = options()
    try:
        methods_of(given)
        protocol = protocol_of(given)
        with connected(given) as client:
            run_on(client, given, protocol)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here")
        return 130
    except (
        ComfyUINotFound,
        OSError,
        PromptRejected,
        ProtocolError,
        ServerError,
    ) as error:
        print(f"\n{error}\nThe same command goes on from here", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
