"""What the benches share: the demo models in a real host, counted model calls, and reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from host import base, inprocess
from portraits import checkpoint, sd15
from portraits.formats import FORMATS

Row = dict[str, Any]


@cache
def _base() -> Path:
    """The folder of this process's ComfyUI, of which there can be one only."""
    return base.make_base(Path(tempfile.mkdtemp(prefix="pinpoint-bench-")))


class Lab:
    """A demo model in a ComfyUI in this process, loaded by stock loaders wherever they can.

    Args:
        format: "sd3", "flux" or "sd15".
        more: arguments of ComfyUI's command line.
    """

    def __init__(self, format: str = "sd3", more: Sequence[str] = ()) -> None:
        self.host = inprocess.start(_base(), more=more)
        self.format = format
        if format == "sd3":
            self.model, self.clip, self.vae = self.run(
                "CheckpointLoaderSimple", ckpt_name=checkpoint.name
            )
        else:
            self.model = self._network()
            (self.clip,) = self.run(
                "CLIPLoader", clip_name=checkpoint.clip_name, type="stable_diffusion"
            )
            vae_name = checkpoint.vae_name if format == "flux" else checkpoint.sd15_vae_name
            (self.vae,) = self.run("VAELoader", vae_name=vae_name)
        self._compared = False

    def _network(self) -> Any:
        if self.format == "sd15":
            with torch.inference_mode():
                return sd15.load_model()
        return self.run("UNETLoader", unet_name=checkpoint.flux_name, weight_dtype="default")[0]

    def run(self, node_id: str, **inputs: Any) -> tuple:
        """Execute one node as ComfyUI would, without a graph, and return its outputs."""
        node: Any = self.host.nodes[node_id]
        with torch.inference_mode():
            if hasattr(node, "execute"):
                return node.execute(**inputs).args
            return getattr(node(), node.FUNCTION)(**inputs)

    def defaults(self, node_id: str) -> dict[str, Any]:
        """The values of a node's widgets as it comes."""
        node: Any = self.host.nodes[node_id]
        inputs = node.GET_SCHEMA().inputs
        return {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}

    def prompts(self, texts: Sequence[str]) -> list:
        """One CONDITIONING whose rows are the prompts.

        The demo's text encoder passes its embeddings through, so they are looked up; a stock
        encoding takes seconds a prompt. The first prompt is encoded both ways and compared.
        """
        tokens = torch.tensor([self.tokens(text) for text in texts])
        context, pooled = FORMATS[self.format].context(tokens), 768
        if self.format == "sd3":
            context, pooled = F.pad(context, (0, 4096 - context.shape[-1])), 2048
        if not self._compared:
            ((stock, _),) = self.run("CLIPTextEncode", clip=self.clip, text=texts[0])[0]
            torch.testing.assert_close(context[:1], stock)
            self._compared = True
        # Neither demo model reads the pooled prompt.
        return [[context, {"pooled_output": torch.zeros(len(texts), pooled)}]]

    def tokens(self, text: str) -> list[int]:
        """A prompt's tokens."""
        (tokens,) = self.clip.tokenize(text)["l"]
        return [token for token, _ in tokens]

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in 0..1 -> LATENT."""
        return self.run("VAEEncode", pixels=images.movedim(1, -1), vae=self.vae)[0]

    def decode(self, latent: dict[str, Tensor]) -> Tensor:
        """LATENT -> (B, 3, H, W) in 0..1."""
        images = self.run("VAEDecode", samples=latent, vae=self.vae)[0]
        return images.movedim(-1, 1).clamp(0, 1)

    def edit_parts(
        self,
        model: Any,
        prompts: dict[str, list],
        seed: int,
        *,
        steps: int,
        n_max: int,
        mask: Tensor | None,
        guidance: tuple[float, float],
        method: str = "FocusFlow",
        remember_source: bool = False,
        **widgets: Any,
    ) -> dict[str, Any]:
        """The inputs of SamplerCustomAdvanced for an edit, but the latent.

        Args:
            prompts: "source", "target" and, for guidance of a cfg model, "negative".
            widgets: more of the Edit Sampler's.
        """
        (sampler,) = self.run(
            "PinpointEditSampler",
            method=method,
            n_max=n_max,
            n_min=0,
            n_avg=1,
            reanchor=False,
            mask=mask,
            **widgets,
        )
        (guider,) = self.run(
            "PinpointSourceTargetGuider",
            model=model,
            **prompts,
            source_guidance=guidance[0],
            target_guidance=guidance[1],
            guidance_mode="auto",
            remember_source=remember_source,
        )
        (sigmas,) = self.run(
            "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0
        )
        (noise,) = self.run("RandomNoise", noise_seed=seed)
        return {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}

    def sampled(
        self, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: dict[str, Tensor]
    ) -> Tensor:
        """What SamplerCustomAdvanced makes of a LATENT, decoded."""
        made, _ = self.run(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        return self.decode(made)

    def counting(self, model: Any) -> tuple[Any, Callable[[], int]]:
        """A clone of a model whose calls are counted, and the count so far."""
        from comfy.patcher_extension import WrappersMP

        calls = 0

        def count(executor: Callable, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return executor(*args, **kwargs)

        counted = model.clone()
        counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "pinpoint_bench", count)
        return counted, lambda: calls


def shallow_clip(format: str) -> Any:
    """The text encoder with two of its twelve layers, which all pass on what they get.

    It says the same as the whole one in a fifth of the time. As a stock loader's, it can make
    itself again for a training copy.
    """
    import comfy.sd
    import folder_paths

    file = folder_paths.get_full_path_or_raise("text_encoders", checkpoint.clip_name)
    kind = comfy.sd.CLIPType.SD3 if format == "sd3" else comfy.sd.CLIPType.STABLE_DIFFUSION

    def load(*, disable_dynamic: bool = False) -> Any:
        clip = comfy.sd.load_clip([file], clip_type=kind, disable_dynamic=disable_dynamic)
        encoder = clip.cond_stage_model.clip_l.transformer.text_model.encoder
        # SD3 reads the last layer but one.
        encoder.layers = encoder.layers[:2]
        return clip

    clip = load()
    clip.patcher.cached_patcher_init = (lambda **how: load(**how).patcher, ())
    return clip


def parser(
    description: str, count: int, *, formats: bool = False, cached: bool = False
) -> argparse.ArgumentParser:
    """The options that every bench has; `formats` for those that run with either demo model."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    if formats:
        made.add_argument("--format", choices=FORMATS, default="sd3", help="the demo model")
    made.add_argument("--count", type=int, default=count, help="held-out cases")
    made.add_argument("--seed", type=int, default=1, help="another seed means other portraits")
    if cached:
        made.add_argument("--cache", type=Path, help="a JSON file that keeps finished rows")
    made.add_argument("--json", type=Path, help="where to write the figures")
    return made


def arguments(description: str, count: int, **more: bool) -> argparse.Namespace:
    """What was given for the options of `parser`."""
    return parser(description, count, **more).parse_args()


class Kept:
    """Finished rows by their keys, in a JSON file from which an interrupted run goes on.

    Several processes may share the file.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.rows: dict[str, Row] = {}

    def row(self, key: str, measured: Callable[..., Row], *inputs: Any) -> Row:
        """A row, which is measured if it is not there."""
        if key not in self.rows:
            self._read()
        if key not in self.rows:
            made = measured(*inputs)
            print(key, {k: round(v, 3) for k, v in made.items()}, flush=True)
            self._read()
            self.rows[key] = made
            if self.file:
                part = self.file.with_suffix(f".{os.getpid()}.part")
                part.write_text(json.dumps(self.rows, indent=1))
                part.replace(self.file)
        return self.rows[key]

    def _read(self) -> None:
        if self.file and self.file.exists():
            self.rows = json.loads(self.file.read_text()) | self.rows


def mean_row(method: str, rows: Sequence[Row]) -> Row:
    """The mean of each figure over the rows that have it."""
    found: Row = {"method": method}
    for figure in dict.fromkeys(key for row in rows for key in row if key != "method"):
        values = [row[figure] for row in rows if figure in row]
        found[figure] = sum(values) / len(values)
    return found


def table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """A Markdown table of the rows' columns."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append("| " + " | ".join(map(_text, cells)) + " |")
    return "\n".join(lines)


def _text(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3f}" if abs(cell) < 1 else f"{cell:.2f}"


def report(rows: list[Row], columns: Sequence[str], target: Path | None, notes: str = "") -> None:
    """Print the table; if a file is named, write the figures as JSON and the table beside it."""
    command = " ".join(["python", Path(sys.argv[0]).as_posix(), *sys.argv[1:]])
    command = command[command.index("tests/") :] if "tests/" in command else command
    text = table(rows, columns)
    print(text)
    if target is None:
        return
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "comfyui": sys.modules["comfyui_version"].__version__,
    }
    figures = {"command": f"python {command}", "versions": versions, "rows": rows}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(figures, indent=1) + "\n")
    heading = f"`python {command}` with {', '.join(f'{k} {v}' for k, v in versions.items())}"
    target.with_suffix(".md").write_text(f"{heading}\n\n{text}\n\n{notes}".rstrip() + "\n")
