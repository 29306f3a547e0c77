"""What the demo workflows edit: portraits with prompts, and the pictures that come of them."""

from __future__ import annotations

import io
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from portraits import demo_case
from portraits.dataset import people, pictures, views
from portraits.people import attributes, caption

from .client import Client
from .prompts import Graph, Outputs

PORTRAIT = "pinpoint_portrait.png"
"""The picture that is edited; `edit` puts the person's own in its place."""
REFERENCE = "pinpoint_reference.png"
REFERENCE_SEED = 10
"""A second portrait, from which some workflows take something, and its seed."""
PEOPLE = "pinpoint_people"
"""A folder of portraits with captions, to train from."""
TWO_CHANGES = frozenset({"flux_sculptor_two_attributes"})
"""The workflows whose target prompt changes two things."""
WITH_IDENTITY = frozenset({"learn_identity", "identity_edits", "makeup_transfer", "two_people"})
"""The workflows whose prompts say <ann> where others say person."""
WITH_MAKEUP = frozenset({"makeup_transfer"})
"""The workflows whose target prompt has the learned lips of the reference."""
WITH_SUBJECT = frozenset({"flexip_gamma", "flexip_subject", "flexip_two_subjects", "train_flexip"})
"""The workflows that give the portrait's person the attributes of the reference."""


@dataclass(frozen=True)
class Case:
    """A picture and the two prompts of its edit, and maybe an instruction to make it."""

    image: Image.Image
    source_prompt: str
    target_prompt: str
    instruction: str = ""


def drawn_case(seed: int, workflow: str = "") -> Case:
    """A drawn portrait with an edit of it, in the words that the workflow needs."""
    pixels, *prompts = demo_case(seed)
    if workflow in WITH_IDENTITY:
        prompts = [prompt.replace("person", "<ann>") for prompt in prompts]
    case = Case(Image.fromarray(pixels), *prompts)
    if workflow in WITH_SUBJECT:
        return replace(case, target_prompt=drawn_case(REFERENCE_SEED).source_prompt)
    if workflow in WITH_MAKEUP:
        return replace(case, target_prompt=re.sub(r"\w+ lips", "<berry> lips", case.source_prompt))
    return _with_second_change(case) if workflow in TWO_CHANGES else case


def drawn_pictures() -> dict[str, Image.Image]:
    """All pictures that the workflows load, by file name."""
    return {PORTRAIT: drawn_case(0).image, REFERENCE: drawn_case(REFERENCE_SEED).image}


def write_people(inputs: Path) -> None:
    """Put drawn portraits and their captions into an input folder, as Train FlexIP reads them."""
    rng, folder = random.Random(0), inputs / PEOPLE
    drawn = {f"invariant/{i}": person for i, person in enumerate(people("demo", 1, 6))}
    for name, person in zip("abcd", people("demo", 2, 4), strict=True):
        drawn |= {f"variant/{name}/{i}": p for i, p in enumerate(views(person, rng, 3))}
    for (name, person), pixels in zip(drawn.items(), pictures(list(drawn.values())), strict=True):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
        file.with_suffix(".txt").write_text(caption(person), "utf-8")


def _with_second_change(case: Case) -> Case:
    """The case with the shirt's colour changed too, or the background's if the shirt's is."""
    source, target = (prompt.split(", ") for prompt in (case.source_prompt, case.target_prompt))
    place = -2 if source[-2] == target[-2] else -1
    noun = target[place].split()[-1]
    color = next(c for c in attributes[noun] if c not in case.target_prompt.split())
    target[place] = f"{color} {noun}"
    return replace(case, target_prompt=", ".join(target))


def upload(server: Client, pictures: dict[str, Image.Image]) -> list[str]:
    """Put pictures into a server's input folder; returns the names that it gave them."""
    return [server.upload_image(name, png(picture)) for name, picture in pictures.items()]


def saved_pictures(server: Client, graph: Graph, outputs: Outputs) -> dict[str, Image.Image]:
    """What a workflow saved as `pinpoint/<name>`, by name, in the order of its nodes."""
    saved = {}
    for node_id in sorted(graph, key=int):
        prefix = str(graph[node_id]["inputs"].get("filename_prefix", ""))
        if prefix.startswith("pinpoint/") and node_id in outputs:
            (picture,) = outputs[node_id]["images"]
            content = io.BytesIO(server.view(**picture))
            saved[prefix.removeprefix("pinpoint/")] = Image.open(content).convert("RGB")
    return saved


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
