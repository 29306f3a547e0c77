"""Train a FlexIP adapter without ComfyUI's page, for long runs; on several GPUs, too.

    python train_flexip.py --comfyui PATH --checkpoint NAME --low NAME --high NAME \
        --data DIR --output NAME [options]
    accelerate launch --multi_gpu train_flexip.py [the same]

Models are named as in ComfyUI's loaders. DIR is laid out as the help page of Train FlexIP Adapter
tells, whose widgets are the options here; with --comfyui, --help lists them all. The adapter goes
to models/flexip, losses and validation pictures to --log. A run that was stopped goes on by the
same command.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).absolute().parent
PACK = "pinpoint"
given_otherwise = ("folder", "file_name")
"""Inputs of the node that have options of another name here."""
longest_wait = timedelta(hours=12)
"""Of a process for others that still encode, or make validation pictures."""
seconds_between_lines = 10.0


def main(arguments: Sequence[str]) -> int:
    """Train, and return the exit code."""
    known, _ = host_parser().parse_known_args(arguments)
    try:
        folder = comfyui_folder(known.comfyui)
    except ValueError as error:
        print(f"{error}\n\n{__doc__}", file=sys.stderr)
        return 2
    # Before ComfyUI asks which GPU is its own.
    try:
        accelerator = started_accelerator(known.cpu)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    start_comfyui(folder, known)
    pack = load_pack()
    options = parser(pack).parse_args(arguments)
    try:
        train(pack, options, accelerator)
    except ValueError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        if accelerator is not None:
            accelerator.end_training()
    return 0


def host_parser() -> argparse.ArgumentParser:
    """Options that have to be known before ComfyUI is there."""
    found = argparse.ArgumentParser(add_help=False)
    found.add_argument("--comfyui", type=Path, help="ComfyUI's folder, if not COMFYUI_PATH")
    found.add_argument("--base-directory", type=Path, help="as ComfyUI's option")
    found.add_argument("--extra-model-paths-config", type=Path, help="as ComfyUI's option")
    found.add_argument("--cpu", action="store_true", help="train on the CPU")
    return found


def comfyui_folder(named: Path | None) -> Path:
    """ComfyUI's folder: as named, else COMFYUI_PATH, else where this pack is installed.

    Raises:
        ValueError: there is none.
    """
    places = [Path(path) for path in (named, os.environ.get("COMFYUI_PATH")) if path]
    places = places[:1] or [p.parent for p in ROOT.parents if p.name == "custom_nodes"]
    for place in places:
        if (place / "main.py").is_file() and (place / "comfy").is_dir():
            return place.absolute()
    raise ValueError(
        f"--comfyui is {places[0] if places else 'not given'}: name the folder of ComfyUI, which "
        "has main.py and comfy in it"
    )


def started_accelerator(cpu: bool) -> Any:
    """What joins the processes that `accelerate launch` has started; None for a single one.

    Raises:
        ValueError: accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return None
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError as error:
        raise ValueError(
            "Several processes need accelerate, which is not installed: pip install accelerate"
        ) from error
    waiting = accelerate.InitProcessGroupKwargs(timeout=longest_wait)
    return accelerate.Accelerator(cpu=cpu, kwargs_handlers=[waiting])


def start_comfyui(folder: Path, options: argparse.Namespace) -> None:
    """Make ComfyUI's modules importable, with its arguments read."""
    # This folder has a package called `nodes`, as ComfyUI has a module.
    sys.path[:] = [place for place in sys.path if Path(place or ".").absolute() != ROOT]
    sys.path.insert(0, str(folder))
    arguments = ["--cpu"] if options.cpu else []
    for name in ("base_directory", "extra_model_paths_config"):
        path = getattr(options, name)
        if path is not None:
            arguments += [f"--{name.replace('_', '-')}", str(path.absolute())]
    own = sys.argv
    sys.argv = [own[0], *arguments]
    importlib.import_module("comfy.options").enable_args_parsing()
    try:
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = own
    if options.extra_model_paths_config is not None:
        load = importlib.import_module("utils.extra_config").load_extra_path_config
        load(str(options.extra_model_paths_config.absolute()))


def load_pack() -> ModuleType:
    """This repository as a package, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    spec.loader.exec_module(pack)
    files, adapters = (
        importlib.import_module(f"{PACK}.nodes.host.{name}")
        for name in ("tensor_files", "adapter_files")
    )
    files.register_folder(adapters.folder)
    return pack


def widgets_of(pack: ModuleType) -> list[Any]:
    """The node's widgets that are options here."""
    io = importlib.import_module("comfy_api.latest").io
    kinds = (io.Int.Input, io.Float.Input, io.Boolean.Input, io.Combo.Input, io.String.Input)
    inputs = pack.nodes.adapter_training.TrainFlexIP.define_schema().inputs
    return [i for i in inputs if isinstance(i, kinds) and i.id not in given_otherwise]


def parser(pack: ModuleType) -> argparse.ArgumentParser:
    """All options."""
    found = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[host_parser()],
    )
    models = found.add_argument_group("models, as ComfyUI's loaders name them")
    models.add_argument("--checkpoint", help="a file of models/checkpoints with all three parts")
    models.add_argument("--unet", help="a file of models/diffusion_models")
    models.add_argument("--clip", nargs="+", help="one or more files of models/text_encoders")
    models.add_argument("--clip-type", default="stable_diffusion", help="as in Load CLIP")
    models.add_argument("--vae", help="a file of models/vae")
    models.add_argument("--low", required=True, help="a file of models/clip_vision, such as DINOv2")
    models.add_argument("--high", required=True, help="a file of models/clip_vision, such as CLIP")
    for name in ("low", "high"):
        models.add_argument(
            f"--{name}-activation",
            choices=pack.nodes.host.image_encoders.ACTIVATIONS,
            default="auto",
            help=f"of --{name}, as in Load Image Encoder (auto)",
        )
    files = found.add_argument_group("files")
    files.add_argument("--data", type=Path, required=True, help="the folder of pictures")
    files.add_argument("--output", required=True, help="name of the adapter in models/flexip")
    files.add_argument("--cache", type=Path, help="of encoded pictures; DATA/encoded if not given")
    files.add_argument("--log", type=Path, help="of losses and pictures; output/flexip/OUTPUT")
    settings = found.add_argument_group("the widgets of Train FlexIP Adapter")
    for widget in widgets_of(pack):
        settings.add_argument(f"--{widget.id.replace('_', '-')}", **as_option(widget))
    return found


def as_option(widget: Any) -> dict[str, Any]:
    """A widget as an option."""
    common = {"default": widget.default, "help": f"{widget.tooltip} ({widget.default})"}
    if hasattr(widget, "options"):
        return {**common, "choices": widget.options}
    if isinstance(widget.default, bool):
        return {**common, "action": argparse.BooleanOptionalAction}
    return {**common, "type": type(widget.default)}


def image_encoder(pack: ModuleType, options: argparse.Namespace, option: str) -> Any:
    """The image encoder that an option names.

    Raises:
        ValueError: a file that cannot be used.
    """
    file_name, activation = (getattr(options, name) for name in (option, f"{option}_activation"))
    try:
        return pack.nodes.host.image_encoders.load(file_name, activation)
    except ValueError as error:
        raise ValueError(f"--{option}: {error}") from error


def train(pack: ModuleType, options: argparse.Namespace, accelerator: Any) -> None:
    """Load everything, train, save and report.

    Raises:
        ValueError: models, pictures or settings that cannot be used.
    """
    node, runs = pack.nodes.adapter_training, pack.nodes.host.flexip_runs
    model, clip, vae = loaded(options)
    pack.nodes.host.lessons.require_parts(clip, vae)
    values = {widget.id: getattr(options, widget.id) for widget in widgets_of(pack)}
    pack.nodes.host.arguments.require_valid(node.TrainFlexIP, values)
    low, high = (image_encoder(pack, options, name) for name in ("low", "high"))
    encoders = pack.nodes.host.flexip_pairs.Encoders(model, clip, vae, low, high)
    is_main = accelerator is None or accelerator.is_main_process
    log = Log(options.log or default_log(options.output)) if is_main else Silence()
    outcome = runs.train(
        encoders,
        options.data.absolute(),
        node.plan_of({**values, "model": model}),
        node.place_of(options.output),
        log,
        resume=options.resume,
        cache=options.cache,
        accelerator=accelerator,
    )
    if isinstance(log, Log):
        log.finish(outcome, pack.nodes.host.curves.drawn(outcome.losses))
        print(outcome.report, flush=True)


def loaded(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, text encoders and VAE.

    Raises:
        ValueError: none are named, or their files are not there.
    """
    comfy_nodes: Any = importlib.import_module("nodes")
    paths = importlib.import_module("folder_paths")
    model = clip = vae = None
    try:
        if options.checkpoint:
            model, clip, vae = comfy_nodes.CheckpointLoaderSimple().load_checkpoint(
                options.checkpoint
            )[:3]
        if options.unet:
            model = comfy_nodes.UNETLoader().load_unet(options.unet, "default")[0]
        if options.clip:
            sd = importlib.import_module("comfy.sd")
            files = [paths.get_full_path_or_raise("text_encoders", name) for name in options.clip]
            kind = getattr(sd.CLIPType, options.clip_type.upper(), None)
            if kind is None:
                raise ValueError(f"--clip-type is {options.clip_type}: use one of Load CLIP's")
            clip = sd.load_clip(ckpt_paths=files, clip_type=kind)
        if options.vae:
            vae = comfy_nodes.VAELoader().load_vae(options.vae)[0]
    except FileNotFoundError as error:
        raise ValueError(f"{error}: name a file that ComfyUI's loaders list") from error
    if model is None:
        raise ValueError("neither --checkpoint nor --unet is given: name a model")
    return model, clip, vae


def default_log(name: str) -> Path:
    """Below ComfyUI's output folder."""
    paths = importlib.import_module("folder_paths")
    return Path(paths.get_output_directory()) / "flexip" / name


class Log:
    """Prints how it goes, and keeps losses and validation pictures; see `flexip_runs.Watcher`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._told = -seconds_between_lines
        print(f"losses and validation pictures go to {folder}", flush=True)

    def tell(self, text: str) -> None:
        """Print it, now and then."""
        if time.monotonic() - self._told >= seconds_between_lines:
            self._told = time.monotonic()
            print(text, flush=True)

    def show(self, step: int, steps: int, pictures: Any) -> None:
        """Save them side by side."""
        self._save(f"step_{step:0{len(str(steps))}}.png", pictures)

    def finish(self, outcome: Any, curve: Any) -> None:
        """Write the losses as a table and as a picture."""
        with (self.folder / "losses.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "loss"])
            rows.writerows(enumerate(outcome.losses, 1))
        self._save("losses.png", curve)

    def _save(self, name: str, pictures: Any) -> None:
        image = importlib.import_module("PIL.Image")
        torch = importlib.import_module("torch")
        row = torch.cat(list(pictures[..., :3]), 1).clamp(0, 1)
        image.fromarray((row * 255).round().byte().numpy()).save(self.folder / name)


class Silence:
    """Of all processes but the main one."""

    def tell(self, text: str) -> None:
        """Say nothing."""

    def show(self, step: int, steps: int, pictures: Any) -> None:
        """Show nothing."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
