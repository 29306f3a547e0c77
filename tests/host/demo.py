"""`run.py edit` and `run.py open`: the pack at work in a real ComfyUI server."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path

# Run as a script, this folder is in place of its parent, where `host` and `portraits` are.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image, ImageOps, UnidentifiedImageError

from host import options
from host.base import make_base
from host.cases import (
    PORTRAIT,
    Case,
    drawn_case,
    drawn_pictures,
    saved_pictures,
    upload,
    write_people,
)
from host.comfyui import ComfyUINotFound, cache_folder
from host.filling import CaseError, fill_in
from host.prompts import Graph, PromptFailed, PromptInterrupted, PromptRejected
from host.server import Server, ServerError, free_port
from host.sheet import side_by_side


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


def edit(settings: argparse.Namespace) -> None:
    """Run a workflow on a portrait and save its pictures side by side."""
    case = choose_case(settings)
    workflow = json.loads((options.WORKFLOWS / f"{settings.workflow}.json").read_text("utf-8"))
    say("Starting ComfyUI")
    with fresh_base() as base, Server(base) as server:
        write_people(base / "input")
        graph = server.convert(workflow)
        upload(server, {**drawn_pictures(), PORTRAIT: case.image})
        prompts = fill_in(graph, case, PORTRAIT, settings.seed)
        say("\n".join(prompts))
        outputs = server.run(graph, progress_line(graph))
        end_progress()
        pictures = saved_pictures(server, graph, outputs)
    if not pictures:
        raise DemoError(f"--workflow {settings.workflow}: it saves no picture as pinpoint/<name>")
    names = [name.replace("_", " ") for name in pictures]
    caption = prompts[-1].partition(": ")[2]
    side_by_side(list(pictures.values()), names, caption).save(settings.output)
    say(str(settings.output.absolute()))


def open_page(settings: argparse.Namespace) -> None:
    """Serve ComfyUI's web page until Ctrl-C."""
    base = make_base(cache_folder() / "base")
    copy_workflows(base / "user" / "default" / "workflows")
    for name, picture in drawn_pictures().items():
        picture.save(base / "input" / name)
    write_people(base / "input")
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
    drawn = drawn_case(settings.seed or 0, settings.workflow)
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


def copy_workflows(folder: Path) -> None:
    """Offer the pack's workflows in the page's own list; one saved there since is kept."""
    for file in options.WORKFLOWS.glob("*.json"):
        copy = folder / file.name
        if not copy.exists() or copy.stat().st_mtime < file.stat().st_mtime:
            shutil.copy2(file, copy)


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
        CaseError,
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
