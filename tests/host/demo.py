"""`run.py edit` and `run.py open`: the pack at work in a real ComfyUI server."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Run as a script, this folder is in place of its parent, where `host` and `portraits` are.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image, ImageOps, UnidentifiedImageError

from host import options
from host.base import make_base
from host.comfyui import ComfyUINotFound, cache_folder
from host.prompts import Graph, Outputs, PromptFailed, PromptInterrupted, PromptRejected
from host.server import Server, ServerError, free_port
from host.sheet import side_by_side
from portraits import demo_case

PORTRAIT = "pinpoint_portrait.png"
PICTURES = ("source", "mask", "edit")


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Case:
    """A picture and the two prompts of its edit."""

    image: Image.Image
    source_prompt: str
    target_prompt: str


def edit(settings: argparse.Namespace) -> None:
    """Run a workflow on a portrait and save source, mask and edit side by side."""
    case = choose_case(settings)
    workflow = json.loads((options.WORKFLOWS / f"{settings.workflow}.json").read_text("utf-8"))
    say(f"Source: {case.source_prompt}")
    say(f"Target: {case.target_prompt}")
    say("Starting ComfyUI")
    with fresh_base() as base, Server(base) as server:
        graph = server.convert(workflow)
        fill_in(graph, case, server.upload_image(PORTRAIT, png(case.image)), settings.seed)
        outputs = server.run(graph, progress_line(graph))
        end_progress()
        pictures = [fetch(server, graph, outputs, name) for name in PICTURES]
    if pictures[-1] is None:
        raise DemoError(f"--workflow {settings.workflow}: it saves no picture as pinpoint/edit")
    side_by_side(pictures, PICTURES, case.target_prompt).save(settings.output)
    say(str(settings.output.absolute()))


def open_page(settings: argparse.Namespace) -> None:
    """Serve ComfyUI's web page until Ctrl-C."""
    base = make_base(cache_folder() / "base")
    copy_workflows(base / "user" / "default" / "workflows")
    drawn_case(0).image.save(base / "input" / PORTRAIT)
    port = free_port(settings.port)
    say("Starting ComfyUI")
    previews = ["--preview-method", "latent2rgb"]
    with Server(base, port=port, arguments=previews) as server:
        address = f"{server.address}/?template=focusflow&source=pinpoint"
        say(f"ComfyUI's log: {server.log}")
        say(f"Open {address} in a web browser; Ctrl-C here stops ComfyUI")
        if settings.browser:
            webbrowser.open(address)
        assert server.process is not None
        server.process.wait()
        raise ServerError(f"ComfyUI ended by itself; its log ends:\n{server.log_tail()}")


@contextlib.contextmanager
def fresh_base() -> Iterator[Path]:
    """A base directory for one run, which disturbs no other run and leaves nothing behind."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="edit-") as name:
        yield make_base(Path(name))


def choose_case(settings: argparse.Namespace) -> Case:
    """The person's picture and prompts, with a drawn portrait's in place of missing ones."""
    drawn = drawn_case(settings.seed or 0)
    image = drawn.image
    if settings.image:
        try:
            picture = ImageOps.exif_transpose(Image.open(settings.image)).convert("RGB")
        except UnidentifiedImageError:
            raise DemoError(f"--image {settings.image}: this is not a picture file") from None
        # The demo model knows one size only.
        image = ImageOps.fit(picture, image.size, Image.Resampling.LANCZOS)
    return Case(
        image,
        settings.source_prompt or drawn.source_prompt,
        settings.target_prompt or drawn.target_prompt,
    )


def drawn_case(seed: int) -> Case:
    """A drawn portrait with an edit of it."""
    pixels, source_prompt, target_prompt = demo_case(seed)
    return Case(Image.fromarray(pixels), source_prompt, target_prompt)


def fill_in(graph: Graph, case: Case, image_name: str, seed: int | None) -> None:
    """Put the picture, the prompts and, if one is given, the seed into the workflow's nodes."""
    node_called(graph, "LoadImage")["image"] = image_name
    node_called(graph, "CLIPTextEncode", "Target prompt")["text"] = case.target_prompt
    # SDEdit knows a target prompt only.
    for node in graph.values():
        if node["_meta"]["title"] == "Source prompt":
            node["inputs"]["text"] = case.source_prompt
    if seed is None:
        return
    for node in graph.values():
        for name in {"seed", "noise_seed"} & node["inputs"].keys():
            # A linked seed is set where it comes from.
            if isinstance(node["inputs"][name], int):
                node["inputs"][name] = seed


def node_called(graph: Graph, class_type: str, title: str | None = None) -> dict:
    """The inputs of the only node of a class, and of a title if one is given."""
    found = [
        node["inputs"]
        for node in graph.values()
        if node["class_type"] == class_type and title in (None, node["_meta"]["title"])
    ]
    if len(found) != 1:
        name = f"{class_type} titled '{title}'" if title else class_type
        raise DemoError(f"The workflow needs one node {name}, it has {len(found)}")
    return found[0]


def fetch(server: Server, graph: Graph, outputs: Outputs, name: str) -> Image.Image | None:
    """The picture the workflow saved as `pinpoint/<name>`; None if it saves no such picture."""
    for node_id, node in graph.items():
        if node["inputs"].get("filename_prefix") == f"pinpoint/{name}" and node_id in outputs:
            (picture,) = outputs[node_id]["images"]
            return Image.open(io.BytesIO(server.view(**picture))).convert("RGB")
    return None


def copy_workflows(folder: Path) -> None:
    """Offer the pack's workflows in the page's own list; one saved there since is kept."""
    for file in options.WORKFLOWS.glob("*.json"):
        copy = folder / file.name
        if not copy.exists() or copy.stat().st_mtime < file.stat().st_mtime:
            shutil.copy2(file, copy)


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def say(message: str) -> None:
    """Print a line at once, also into a pipe."""
    print(message, flush=True)


def progress_line(graph: Graph) -> Callable[[str, float], None]:
    """A progress callback that keeps one line up to date; without a terminal, a line per node."""
    terminal = sys.stdout.isatty()
    last = ""

    def show(node_id: str, done: float) -> None:
        nonlocal last
        # A node that expands into others reports under ids that begin with its own.
        title = graph[node_id.split(".")[0]]["_meta"]["title"]
        line = f"{title}: {done:4.0%}" if terminal else title
        if line != last:
            print(f"\r{line:<60}" if terminal else line, end="" if terminal else "\n", flush=True)
        last = line

    return show


def end_progress() -> None:
    """Wipe the progress line off a terminal."""
    if sys.stdout.isatty():
        print(f"\r{'':<60}\r", end="")


def main() -> int:
    """Run the command and turn what can go wrong into a sentence."""
    settings = options.parse(sys.argv[1:])
    # Leaves through the `with` blocks, so that ComfyUI does not outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        (edit if settings.command == "edit" else open_page)(settings)
    except KeyboardInterrupt:
        say("\nStopped")
        return 0 if settings.command == "open" else 130
    except (
        ComfyUINotFound,
        DemoError,
        OSError,
        PromptFailed,
        PromptInterrupted,
        PromptRejected,
        ServerError,
    ) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
