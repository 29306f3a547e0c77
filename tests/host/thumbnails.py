"""Make the pictures that ComfyUI's template browser shows for the workflows.

    python tests/host/thumbnails.py [NAME ...]

Runs each demo workflow on the demo portrait in a real server and writes `workflows/<name>.jpg`.
Workflows whose models do not ship get the one-node workflow's pictures and the model's name. To be
run again when a workflow, the demo portrait or the demo weights change.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw, ImageFont, ImageOps

from host.cases import drawn_pictures, saved_pictures, upload, write_people
from host.demo import fresh_base
from host.options import WORKFLOWS
from host.server import Server
from host.workflows import NAMES, Workflow, load

SIZE = 512  # the browser's cards are square
TILE, GAP = 254, 4
INK, DIM, PAPER, STRIP = (240, 240, 240), (170, 170, 170), (38, 38, 42), (150, 60, 40)
QUALITY, LARGEST = 90, 60_000

NEEDS = {
    "focusflow_sd35_medium": ("focusflow", "SD3.5 medium"),
    "focusflow_flux1_dev": ("focusflow", "Flux.1-dev"),
    "flux_sculptor_flux1_dev": ("flux_sculptor", "Flux.1-dev"),
    "s2edit_sd15": ("identity_edits", "SD1.5"),
    "s2edit_sdxl": ("identity_edits", "SDXL"),
    "flexip_ip_adapter_sd15": ("flexip_gamma", "SD1.5"),
}
"""Workflow -> the demo workflow in whose place it stands, and the model that it needs."""

Pictures = dict[str, Image.Image]


def main(names: list[str]) -> None:
    """Write the thumbnails of the named workflows, of all of them if none is named."""
    workflows = {name: load(name) for name in known(names)}
    shown = {name: NEEDS.get(name, (name, ""))[0] for name in workflows}
    results: dict[str, Pictures] = {}
    with fresh_base() as base, Server(base) as server:
        upload(server, drawn_pictures())
        write_people(base / "input")
        for name in sorted(set(shown.values())):
            print(f"running {name}", flush=True)
            results[name] = run(server, load(name))
    for name, workflow in workflows.items():
        needs = NEEDS.get(name, ("", ""))[1]
        file = WORKFLOWS / f"{name}.jpg"
        thumbnail(results[shown[name]], title(workflow), needs).save(file, quality=QUALITY)
        if file.stat().st_size > LARGEST:
            raise SystemExit(f"{file} has {file.stat().st_size} bytes: lower QUALITY")
        print(file, flush=True)


def known(names: list[str]) -> list[str]:
    """The named workflows, or all of them."""
    unknown = set(names) - set(NAMES)
    if unknown:
        raise SystemExit(f"there is no workflow called {', '.join(sorted(unknown))}")
    return [name for name in NAMES if not names or name in names]


def run(server: Server, workflow: Workflow) -> Pictures:
    """What a workflow saves, by the last part of the prefix; the mask last, if there is one."""
    graph = server.convert(workflow)
    saved = saved_pictures(server, graph, server.run(graph))
    return dict(sorted(saved.items(), key=lambda item: item[0] == "mask"))


def title(workflow: Workflow) -> str:
    """The title of a workflow's note."""
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    return note["title"]


def thumbnail(pictures: Pictures, title: str, needs: str) -> Image.Image:
    """Two pictures, under them the third, if there is one, and the title."""
    sheet = Image.new("RGB", (SIZE, SIZE), PAPER)
    draw = ImageDraw.Draw(sheet)
    right = TILE + GAP
    places = ((0, 0), (right, 0), (0, right))
    for (name, picture), (x, y) in zip(pictures.items(), places, strict=False):
        tile = ImageOps.pad(picture, (TILE, TILE), Image.Resampling.LANCZOS, PAPER)
        sheet.paste(tile, (x, y))
        label = name.replace("_", " ")
        draw.text((x + 10, y + TILE - 30), label, INK, font(18), stroke_width=2, stroke_fill=PAPER)
    left, columns = (right, 17) if len(pictures) > 2 else (0, 36)
    y = right + 24
    for line in textwrap.wrap(title, columns):
        draw.text((left + 16, y), line, INK, font(26))
        y += 34
    if needs:
        draw.text((left + 16, SIZE - 84), "pictures: demo model", DIM, font(18))
        draw.rectangle((right, SIZE - 54, SIZE, SIZE), STRIP)
        draw.text((right + 16, SIZE - 40), f"needs {needs}", INK, font(22))
    else:
        draw.text((left + 16, SIZE - 40), "Pinpoint", DIM, font(20))
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine."""
    return ImageFont.load_default(size=size)


if __name__ == "__main__":
    main(sys.argv[1:])
