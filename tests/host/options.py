"""The command line of `run.py edit` and `run.py open`, checked before anything is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .comfyui import PACK

WORKFLOWS = PACK / "workflows"
REAL_WEIGHTS = {
    "focusflow_sd35_medium": {"ckpt_name"},
    "focusflow_flux1_dev": {"unet_name", "clip_name1", "clip_name2", "vae_name"},
    "flux_sculptor_flux1_dev": {"unet_name", "clip_name1", "clip_name2", "vae_name"},
    "s2edit_sd15": {"ckpt_name"},
    "s2edit_sdxl": {"ckpt_name"},
    "flexip_ip_adapter_sd15": {"ckpt_name", "file_name", "preservation", "personalization"},
}
"""Workflow -> the inputs that name a file which does not ship."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read "edit ..." or "open ..."; ends the program with a sentence when they make no sense."""
    parser = argparse.ArgumentParser(prog="run.py")
    commands = parser.add_subparsers(dest="command", required=True)
    edit = commands.add_parser(
        "edit",
        help="edit a portrait with a real ComfyUI server",
        description="Edit a portrait with a real ComfyUI server and a demo model; saves the "
        "workflow's pictures, such as source, mask and edit, side by side.",
    )
    _add_edit_options(edit)
    page = commands.add_parser(
        "open",
        help="start ComfyUI with its web page",
        description="Start ComfyUI with its web page, the pack, the demo models and the workflows.",
    )
    page.add_argument("--port", type=int, default=8188, help="port, or the next free one (8188)")
    page.add_argument("--browser", action="store_true", help="open the page in the web browser")
    options = parser.parse_args(argv)
    if options.command == "edit":
        _check_edit(edit, options)
    return options


def _add_edit_options(edit: argparse.ArgumentParser) -> None:
    edit.add_argument("--source-prompt", metavar="TEXT", help="what the picture shows")
    edit.add_argument("--target-prompt", metavar="TEXT", help="what it shall show")
    edit.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="a picture instead of a drawn portrait (the demo models know cartoon portraits only)",
    )
    edit.add_argument("--seed", type=int, metavar="N", help="another portrait, edit and noise")
    edit.add_argument("--workflow", default="focusflow", metavar="NAME", help="one of workflows/")
    edit.add_argument(
        "--output",
        type=Path,
        default=Path("pinpoint_edit.png"),
        metavar="FILE",
        help="where the pictures go (pinpoint_edit.png)",
    )


def _check_edit(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not (WORKFLOWS / f"{options.workflow}.json").is_file():
        names = ", ".join(sorted(file.stem for file in WORKFLOWS.glob("*.json")))
        parser.error(f"--workflow {options.workflow}: there is no such workflow, only {names}")
    if options.workflow in REAL_WEIGHTS:
        parser.error(
            f"--workflow {options.workflow}: its models do not ship; open it on the page of a "
            "ComfyUI that has them"
        )
    if options.seed is not None and not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed}: it has to be at least 0 and below 2**63")
    if options.image and not options.image.is_file():
        parser.error(f"--image {options.image}: there is no such file")
    if options.image and not (options.source_prompt and options.target_prompt):
        parser.error("--image needs --source-prompt and --target-prompt: only you know the picture")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: its folder does not exist")
    if options.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"--output {options.output}: the name has to end in .png, .jpg or .webp")
