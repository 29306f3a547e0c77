"""Scores of edits: everything that is connected is judged, one row a picture.

`score` needs no node; a protocol calls it with tensors and loaded networks.
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor

from ...kernels import scores
from ...kernels.scores import Distance, Score
from . import judges

REGIONS = ("as published", "pixels only")
undefined = -1.0
"""On a FLOAT wire, of a score that is not defined; no score of ours reaches so low."""

Row = dict[str, Score]
_scales = {
    "psnr": (1.0, "dB"),
    "ssim": (1e2, "x10^2"),
    "mse": (1e4, "x10^4"),
    "lpips": (1e3, "x10^3"),
    "structure distance": (1e3, "x10^3"),
    "clip whole": (1e2, "x10^2"),
    "clip inside": (1e2, "x10^2"),
}
"""By score, or by the last word of its name: what it is multiplied by where it is published."""


@dataclass(frozen=True)
class Judges:
    """What judges; None is not asked.

    Attributes:
        lpips: the network.
        clip, clip_vision: the towers of one CLIP.
        dino: for structure and DINO-I.
        identity: an encoder of identities.
    """

    lpips: Distance | None = None
    clip: CLIP | None = None
    clip_vision: ClipVisionModel | None = None
    dino: ClipVisionModel | None = None
    identity: ClipVisionModel | None = None


@dataclass(frozen=True)
class Prompts:
    """Of the picture as it is and as it shall be; "" is not known."""

    source: str = ""
    target: str = ""


def require_torchmetrics() -> None:
    """Refuse to start without the package that counts."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError(
            "torchmetrics is not installed, which counts the scores: run pip install -r "
            "requirements.txt of Pinpoint with ComfyUI's Python, and start ComfyUI again"
        )


@torch.no_grad()
def score(
    source: Tensor,
    edited: Tensor,
    target: Tensor | None = None,
    mask: Tensor | None = None,
    prompts: Prompts | None = None,
    judges_: Judges | None = None,
    regions: str = REGIONS[0],
) -> Row:
    """Judge one edit.

    Args:
        source, edited, target: (1, 3, H, W) in [0, 1], the same sizes; `target` is the true edit.
        mask: (1, H, W), 1 = edit, inside from 0.5 on.
        prompts: for the scores of CLIP.
        judges_: the networks.
        regions: one of REGIONS.

    Raises:
        ValueError: a network that cannot be used, or a prompt that is too long.
    """
    by, said = judges_ or Judges(), prompts or Prompts()
    published = regions == REGIONS[0]
    row: Row = {}
    areas: dict[str, Tensor | None] = {"whole": None}
    if mask is not None:
        inside = (mask >= 0.5).to(source)
        areas |= {"background": 1 - inside, "foreground": inside}
    pairs = [(name, source, area) for name, area in areas.items()]
    pairs += [("true edit", target, None)] if target is not None else []
    for name, other, area in pairs:
        found = scores.pixel_scores(other, edited, area, published=published)
        row |= {f"{name} {metric}": value for metric, value in found.items()}
        if by.lpips:
            row[f"{name} lpips"] = scores.perceptual_distance(
                other, edited, by.lpips, area, published=published
            )
        comfy.model_management.throw_exception_if_processing_interrupted()
    if target is not None:
        row["edit kept"] = scores.kept_share(source, edited, target)
    if by.dino is not None:
        row |= _dino_scores(by.dino, source, edited)
    if by.identity is not None:
        faces = [judges.embedding(by.identity, "identity", p) for p in (source, edited)]
        row["identity"] = scores.cosine(*faces)
    if by.clip_vision is not None:
        row |= _clip_scores(by, said, source, edited, areas.get("foreground"))
    return row


def _dino_scores(dino: ClipVisionModel, source: Tensor, edited: Tensor) -> Row:
    keys = [judges.keys(dino, picture) for picture in (source, edited)]
    embeddings = [judges.embedding(dino, "dino", picture) for picture in (source, edited)]
    return {
        "structure distance": scores.structure_distance(*keys),
        "dino-i": scores.cosine(*embeddings),
    }


def _clip_scores(
    by: Judges, prompts: Prompts, source: Tensor, edited: Tensor, inside: Tensor | None
) -> Row:
    """Of one CLIP; what words there are decides which."""

    def seen(picture: Tensor) -> Tensor:
        assert by.clip_vision is not None
        return judges.embedding(by.clip_vision, "clip_vision", picture).cpu()

    before, after = seen(source), seen(edited)
    row: Row = {"clip-i": scores.cosine(before, after)}
    if by.clip is None or not prompts.target:
        return row
    words = judges.Words(by.clip, len(after))
    wanted = words.embedding(prompts.target, "target_prompt")
    row["clip whole"] = scores.cosine(after, wanted)
    judges.warn_of_strangers(row["clip whole"])
    if inside is not None:
        cut = edited * inside[:, None]
        row["clip inside"] = scores.cosine(seen(cut), wanted) if inside.any() else None
    if prompts.source:
        known = words.embedding(prompts.source, "source_prompt")
        row["clip direction"] = scores.cosine(after - before, wanted - known)
    return row


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean of each score over the rows where it is defined."""
    found: Row = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def on_wire(row: Row, name: str) -> float:
    """A score for a FLOAT output: plain units, `undefined` where there is none."""
    value = row.get(name)
    return undefined if value is None else value


def _scale(name: str) -> tuple[float, str]:
    return _scales.get(name) or _scales.get(name.split()[-1], (1.0, ""))


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line for each score and a column for each picture, scaled as scores are published."""
    columns = [*zip(names, rows, strict=True)]
    if len(rows) > 1:
        columns.append(("mean", mean_row(rows)))
    lines = [["score", *(name for name, _ in columns)]]
    for name in rows[0]:
        factor, unit = _scale(name)
        cells = [shown(row[name], factor) for _, row in columns]
        lines.append([f"{name} {unit}".rstrip(), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


def shown(value: Score, factor: float = 1.0) -> str:
    """A score for people."""
    return "not defined" if value is None else f"{value * factor:.4g}"


def csv_lines(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, str]:
    """The head and a line for each picture, in plain units; what is not defined is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *rows[0]])
    for name, row in zip(names, rows, strict=True):
        writer.writerow(
            [name, *("" if value is None else f"{value:.8g}" for value in row.values())]
        )
    head, _, lines = text.getvalue().partition("\n")
    return head, lines.rstrip("\n")


def from_csv(text: str, count: int) -> list[Row]:
    """Rows that `csv_lines` wrote, head and lines.

    Raises:
        ValueError: it is none of ours, or of another number of edits.
    """
    head, *lines = list(csv.reader(io.StringIO(text.strip()))) or [[]]
    try:
        rows = [
            {
                name: float(cell) if cell else None
                for name, cell in zip(head[1:], line[1:], strict=True)
            }
            for line in lines
        ]
    except ValueError as error:
        raise ValueError(
            f"scores is no csv of Edit Score ({error}): connect that output, or leave it empty"
        ) from error
    if head[:1] != ["name"] or len(rows) != count:
        raise ValueError(
            f"scores has {len(rows)} rows for {count} edits: connect the csv of Edit Score for the "
            "same edits, or leave it empty"
        )
    return rows


def chosen(text: str, rows: Sequence[Row]) -> list[str]:
    """Scores named in a list with commas; all if it is empty.

    Raises:
        ValueError: one is not known.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in rows[0]:
            raise ValueError(f"show has {name}, which is no score here: use {', '.join(rows[0])}")
    return names or list(rows[0])


def line(name: str, value: Score) -> str:
    """A score with its name, scaled as it is published."""
    factor, unit = _scale(name)
    if unit == "dB" and value is not None:
        return f"{name}: {shown(value)} dB"
    return f"{name} {unit}".rstrip() + f": {shown(value, factor)}"
