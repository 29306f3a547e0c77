"""Readers of the folders in which protocols are published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from .cases import Case, Protocol, ProtocolError, Size, opened_mask

PIE_TYPES = (
    "random",
    "change object",
    "add object",
    "delete object",
    "change attribute: content",
    "change attribute: pose",
    "change attribute: color",
    "change attribute: material",
    "change background",
    "change style",
)
"""PIE-Bench's editing types by their numbers."""
LIVE = {"cat", "dog", "person"}
"""Classes that DreamBench's live prompts are for."""
seeds_each = 4
"""Pictures that DreamBench makes of a subject by a prompt."""
_pictures = {".png", ".jpg", ".jpeg", ".webp"}


def pie_bench(folder: Path) -> Protocol:
    """PIE-Bench (cure-lab/PnPInversion, 2023): mapping_file.json, annotation_images/.

    Raises:
        ProtocolError: the mapping file is missing or has another form.
    """
    mapping = _json(folder / "mapping_file.json")
    cases = []
    for key, item in mapping.items():
        with _named(folder / "mapping_file.json", key):
            cases.append(
                Case(
                    id=Path(item["image_path"]).with_suffix("").as_posix(),
                    image=folder / "annotation_images" / item["image_path"],
                    source_prompt=_without_brackets(item["original_prompt"]),
                    target_prompt=_without_brackets(item["editing_prompt"]),
                    instruction=item.get("editing_instruction", ""),
                    group=PIE_TYPES[int(item["editing_type_id"])],
                    mask=partial(mask_of_runs, item["mask"]),
                )
            )
    scores = (
        *("structure distance", "background psnr", "background lpips", "background mse"),
        *("background ssim", "clip whole", "clip inside"),
    )
    return Protocol("pie-bench", cases, scores, lpips="squeeze")


def mask_of_runs(runs: list[int], size: Size) -> Image.Image:
    """PIE-Bench's masks: starts and lengths of runs in the picture's rows, one after another.

    The outermost pixels are always inside, as in the reference.
    """
    width, height = size
    mask = np.zeros(width * height, np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask[start : start + length] = 255
    picture = mask.reshape(height, width)
    picture[[0, -1]] = 255
    picture[:, [0, -1]] = 255
    return Image.fromarray(picture)


def focusflow(file: Path) -> Protocol:
    """FocusFlow's and FlowEdit's list of cases, a YAML file.

    Pictures are relative to it or, as FlowEdit's file names another folder, lie by their bare names
    beside it or in images/ there.

    Raises:
        ProtocolError: the file is missing or has another form.
    """
    try:
        entries = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ProtocolError(
            f"{file} cannot be read ({error}): name the YAML file of cases"
        ) from None
    if not isinstance(entries, list):
        raise ProtocolError(f"{file} holds no list: it needs entries with input_img and prompts")
    cases = []
    for number, entry in enumerate(entries):
        with _named(file, f"entry {number + 1}"):
            image = _beside(file, entry.get("input_img") or entry["init_img"])
            targets = entry["target_prompts"]
            if isinstance(targets, str):
                raise TypeError("target_prompts is one text: write a list")
            codes = _codes(entry.get("target_codes"), len(targets))
            cases += [
                Case(
                    id=f"{number:03}_{image.stem}/{code}",
                    image=image,
                    source_prompt=entry["source_prompt"],
                    target_prompt=target,
                    group=image.stem,
                )
                for code, target in zip(codes, targets, strict=True)
            ]
    return Protocol("focusflow", cases, ("clip whole", "whole lpips", "whole psnr"))


def portraits(folder: Path) -> Protocol:
    """A folder of portraits for Flux-Sculptor's columns: portraits.json and what it names.

    The paper has published no set. The file has `attributes`, name -> phrases of its values, and
    `cases`, each with `image`, `source_prompt`, `target_prompt`, the `attribute` and the phrase
    (`value`) that the edit asks for, and maybe a `mask`.

    Raises:
        ProtocolError: the file is missing or has another form.
    """
    file = folder / "portraits.json"
    said = _json(file)
    cases = []
    for number, item in enumerate(said.get("cases", [])):
        with _named(file, f"case {number + 1}"):
            mask = folder / item["mask"] if item.get("mask") else None
            cases.append(
                Case(
                    id=f"{number:03}_{Path(item['image']).stem}",
                    image=folder / item["image"],
                    source_prompt=item["source_prompt"],
                    target_prompt=item["target_prompt"],
                    group=item["attribute"],
                    mask=partial(opened_mask, mask) if mask else None,
                    attribute=item["attribute"],
                    value=_one_of(item["value"], said["attributes"][item["attribute"]]),
                    drawn=item.get("drawn"),
                )
            )
    scores = (
        *("clip whole", "clip direction", "attribute edited", "attributes kept", "identity"),
        *("background psnr", "whole lpips"),
    )
    return Protocol("portraits", cases, scores, attributes=said.get("attributes", {}))


def subjects(folder: Path) -> Protocol:
    """DreamBench (google/dreambooth): a folder of pictures a subject, prompts_and_classes.txt.

    Of each subject, the first picture is shown to the workflow; scores are means over all of them.

    Raises:
        ProtocolError: the text file is missing, has no classes, or names folders without pictures.
    """
    file = folder / "prompts_and_classes.txt"
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise ProtocolError(f"{file} cannot be read ({error}): name the dataset's folder") from None
    classes = re.findall(r"^([\w-]+),([\w ]+)$", text, re.MULTILINE)[1:]
    if not classes:
        raise ProtocolError(f"{file} has no lines 'subject,class': it is not DreamBench's file")
    cases = [case for subject, kind in classes for case in _of_subject(file, text, subject, kind)]
    return Protocol("subjects", cases, ("clip whole", "clip-i", "dino-i"))


def _of_subject(file: Path, text: str, subject: str, kind: str) -> Iterator[Case]:
    folder = file.parent / subject
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in _pictures)
    if not found:
        raise ProtocolError(f"{file} names {subject}, but {folder} has no pictures: put them there")
    objects, _, live = text.partition("Live Subject Prompts")
    prompts = re.findall(r"^'(.*)'\.format", live if kind in LIVE else objects, re.MULTILINE)
    for index, prompt in enumerate(prompts):
        # Of "{0} {1}" the first is a word that a model has learned for the subject.
        words = " ".join(prompt.format("", kind).split())
        for seed in range(seeds_each):
            yield Case(
                id=f"{subject}/{index:02}_{seed}",
                image=found[0],
                source_prompt=f"a {kind}",
                target_prompt=words,
                group=subject,
                references=(*found,),
                seed=seed,
            )


LAYOUTS: dict[str, Callable[[Path], Protocol]] = {
    "pie-bench": pie_bench,
    "focusflow": focusflow,
    "portraits": portraits,
    "subjects": subjects,
}


def _codes(given: list[str] | None, count: int) -> list[str]:
    """Names of an entry's targets, as parts of paths; their numbers if it gives none."""
    codes = [re.sub(r"[^\w-]+", "_", str(code)) for code in given or ()]
    if len(set(codes)) != len(codes):
        raise ValueError("two of target_codes are one name: change one")
    return codes or [f"tar_{index}" for index in range(count)]


def _beside(file: Path, name: str) -> Path:
    """A picture that a YAML file names; the named place if it is in none."""
    bare = Path(name).name
    places = [file.parent / name, *(file.parent / folder / bare for folder in _image_folders)]
    return next((place for place in places if place.is_file()), places[0])


_image_folders = ("", "Images", "images")


def _without_brackets(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ProtocolError(
            f"{file} cannot be read ({error}): name the folder that has it"
        ) from None
    if not isinstance(found, dict):
        raise ProtocolError(f"{file} holds no object: it is not the file of this protocol")
    return found


def _one_of(value: str, values: list[str]) -> str:
    if value not in values:
        raise ValueError(f"{value} is none of {', '.join(values)}")
    return value


@contextmanager
def _named(file: Path, entry: str) -> Iterator[None]:
    """Turns what is wrong in an entry into a sentence that names file and entry."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ProtocolError(
            f"{file}, {entry}: {error!r}; it has not the form of this protocol"
        ) from error
