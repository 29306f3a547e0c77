"""The proving ground's portraits in each protocol's layout, and their own judge of attributes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from portraits.dataset import Edit, edited_pixels, edits, people, pictures, smallest_change, views
from portraits.judging import drawn_values, nearest
from portraits.people import Portrait, attributes, caption, phrase

from .cases import Case, scaled
from .layouts import PIE_TYPES, seeds_each

_split = "held-out"
_side = 128
_pie_types = {
    "hair length": "change attribute: content",
    "expression": "change attribute: content",
    "background": "change background",
}
"""PIE-Bench's editing types of attributes that are neither added, removed nor coloured."""


def pie_bench(folder: Path, seed: int, count: int) -> Path:
    """Write edits of portraits as PIE-Bench has its own; returns what the reader is given."""
    mapping = {}
    for number, edit in enumerate(edits(_split, seed, count)):
        kind = PIE_TYPES.index(_pie_type(edit))
        source, target = caption(edit.source), caption(edit.target)
        name = f"{kind}_{PIE_TYPES[kind].replace(': ', '_').replace(' ', '_')}/{number:012}.jpg"
        _save(edit.source, folder / "annotation_images" / name)
        mapping[f"{number:012}"] = {
            "image_path": name,
            "original_prompt": source,
            "editing_prompt": _bracketed(source, target),
            "editing_instruction": "",
            "editing_type_id": str(kind),
            "blended_word": "",
            "mask": runs_of(_changed(edit)),
        }
    (folder / "mapping_file.json").write_text(json.dumps(mapping, indent=1), "utf-8")
    return folder


def focusflow(folder: Path, seed: int, count: int) -> Path:
    """Write portraits and a YAML file of cases, two targets a portrait."""
    entries = []
    for number, edit in enumerate(edits(_split, seed, -(-count // 2))):
        other = "shirt" if edit.attribute == "background" else "background"
        value = next(v for v in attributes[other] if v != edit.source.attributes[other])
        targets = [edit.target, edit.source.having(other, value)]
        name = f"images/{number:03}.png"
        _save(edit.source, folder / name)
        entries.append(
            {
                "input_img": name,
                "source_prompt": caption(edit.source),
                "target_prompts": [caption(target) for target in targets],
                "target_codes": [f"{number:03}_{index}" for index in range(len(targets))],
            }
        )
    file = folder / "edits.yaml"
    file.write_text(yaml.safe_dump(entries, sort_keys=False), "utf-8")
    return file


def portraits(folder: Path, seed: int, count: int) -> Path:
    """Write portraits with portraits.json, whose cases say how they were drawn."""
    cases = []
    for number, edit in enumerate(edits(_split, seed, count)):
        name = f"{number:03}.png"
        _save(edit.source, folder / name)
        mask = Image.fromarray((_changed(edit) * 255).byte().numpy())
        mask.save(folder / f"{number:03}_mask.png")
        cases.append(
            {
                "image": name,
                "mask": f"{number:03}_mask.png",
                "source_prompt": caption(edit.source),
                "target_prompt": caption(edit.target),
                "attribute": edit.attribute,
                "value": phrase(edit.attribute, edit.target),
                "drawn": {
                    "attributes": edit.target.attributes,
                    "identity": edit.target.identity,
                },
            }
        )
    phrases = {name: list(_phrases(name)) for name in attributes}
    said = {"attributes": phrases, "cases": cases}
    (folder / "portraits.json").write_text(json.dumps(said, indent=1), "utf-8")
    return folder


def subjects(folder: Path, seed: int, count: int) -> Path:
    """Write people as DreamBench's subjects; each picture by a prompt is one of `count` cases."""
    prompts_each = 2
    number = max(1, count // (prompts_each * seeds_each))
    rng = random.Random(f"{_split}:subjects:{seed}")
    names = [f"person{index}" for index in range(number)]
    for name, person in zip(names, people(_split, seed, number), strict=True):
        for index, view in enumerate(views(person, rng, 4)):
            _save(view, folder / name / f"{index:02}.jpg")
    asked = [caption(person) for person in people(_split, seed + 1, prompts_each)]
    asked = [prompt.replace("person", "{0} {1}", 1) for prompt in asked]
    lines = [f"'{prompt}'.format(unique_token, class_token)," for prompt in asked]
    prompts = "\n".join(["prompt_list = [", *lines, "]"])
    classes = "\n".join(["subject_name,class", *(f"{name},person" for name in names)])
    text = f"Classes\n\n{classes}\n\nPrompts\n\nObject Prompts\n\n{prompts}\n\n"
    text += f"Live Subject Prompts\n\n{prompts}\n"
    (folder / "prompts_and_classes.txt").write_text(text, "utf-8")
    return folder


WRITERS: dict[str, Callable[[Path, int, int], Path]] = {
    "pie-bench": pie_bench,
    "focusflow": focusflow,
    "portraits": portraits,
    "subjects": subjects,
}


def runs_of(mask: Tensor) -> list[int]:
    """Starts and lengths of a mask's runs, PIE-Bench's way: (H, W) of 0 and 1."""
    flat = np.concatenate([[0], mask.flatten().numpy() > 0.5, [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    return [int(n) for pair in zip(edges[::2], edges[1::2] - edges[::2], strict=True) for n in pair]


def words(case: Case, picture: Image.Image) -> tuple[dict[str, str], dict[str, str]]:
    """What a portrait should show of the attributes that can be seen, and what a picture shows.

    A picture shows the value whose drawing it is nearest to.
    """
    assert case.drawn is not None, "asked of drawn portraits only"
    person = Portrait(dict(case.drawn["attributes"]), tuple(case.drawn["identity"]))
    image, wanted, found = _tensor(scaled(picture, (_side, _side))), {}, {}
    for name in attributes:
        drawings, region = drawn_values([person], name, _side)
        if name == case.attribute or region.sum() >= smallest_change:
            (index,) = nearest(image, drawings, region)
            wanted[name] = phrase(name, person)
            found[name] = phrase(name, person.having(name, attributes[name][index]))
    return wanted, found


def _phrases(attribute: str) -> Sequence[str]:
    """All that captions call an attribute's values."""
    bare = Portrait({name: values[0] for name, values in attributes.items()}, ())
    people = [bare.having(attribute, value) for value in attributes[attribute]]
    if attribute in ("hair length", "hair"):
        lengths, colours = attributes["hair length"], attributes["hair"]
        people = [
            bare.having("hair length", length).having("hair", colour)
            for length in lengths
            for colour in colours
        ]
    return list(dict.fromkeys(phrase(attribute, person) for person in people))


def _pie_type(edit: Edit) -> str:
    before, after = (p.attributes[edit.attribute] for p in (edit.source, edit.target))
    if before == "no":
        return "add object"
    if after == "no":
        return "delete object"
    return _pie_types.get(edit.attribute, "change attribute: color")


def _bracketed(source: str, target: str) -> str:
    """The target prompt with what the source does not say in brackets."""
    known = source.split(", ")
    return ", ".join(p if p in known else f"[{p}]" for p in target.split(", "))


def _changed(edit: Edit) -> Tensor:
    source, target = (pictures([p]).float() / 255 for p in (edit.source, edit.target))
    return edited_pixels(source, target)[0]


def _save(person: Portrait, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (pixels,) = pictures([person])
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, quality=95, subsampling=0)


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
