"""Scores of edits by Pinpoint's own nodes, on the server that made them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image, ImageOps

from host.client import Client
from host.graphs import NodeGraph, Wire

from .cases import Case, ProtocolError, opened
from .running import uploaded

Scores = dict[str, float | None]
clip_side = 224
"""What most CLIPs look at, in pixels."""


@dataclass(frozen=True)
class Judges:
    """Files of networks on the server; "" is not asked.

    Attributes:
        lpips: alex, vgg or squeeze.
        clip, clip_vision: the towers of one CLIP, in models/text_encoders and models/clip_vision.
        dino, identity: in models/clip_vision.
    """

    lpips: str = ""
    clip: str = ""
    clip_vision: str = ""
    dino: str = ""
    identity: str = ""


def require(judges: Judges, known: Mapping[str, Any]) -> None:
    """Refuse judges that a server has not.

    Args:
        known: the server's object_info.

    Raises:
        ProtocolError: it says which option, and what there is.
    """
    if not {"PinpointEditScore", "PinpointLoadImageEncoder"} <= known.keys():
        raise ProtocolError("The server has no Edit Score: install Pinpoint there, and restart it")
    if judges.clip and not judges.clip_vision:
        raise ProtocolError(f"--clip {judges.clip} needs --clip-vision, of the same CLIP")
    for name, file in asdict(judges).items():
        node, widget, folder = _places.get(name, _encoders)
        there = _options(known[node], widget)
        if file and file not in there:
            raise ProtocolError(
                f"--{name.replace('_', '-')} {file} is not in {folder}: "
                f"there are {', '.join(there) or 'none'}"
            )


_encoders = ("PinpointLoadImageEncoder", "file_name", "the server's models/clip_vision")
_places = {
    "lpips": ("PinpointEditScore", "lpips", "the networks of Edit Score"),
    "clip": ("CLIPLoader", "clip_name", "the server's models/text_encoders"),
}
"""Judge -> the node and widget that name it, and where its file lies."""


def _options(node: Mapping[str, Any], widget: str) -> list[str]:
    """What a widget can be set to; servers write it in two ways."""
    kind, *more = node["input"]["required"][widget]
    return kind if isinstance(kind, list) else more[0]["options"]


def score(
    client: Client,
    judges: Judges,
    case: Case,
    source: Image.Image,
    edited: Image.Image,
    timeout: float,
) -> Scores:
    """What Edit Score says of an edit; for a subject, the mean over its pictures.

    Args:
        source, edited: of the same size, unless the case has pictures of a subject.
        timeout: in seconds.

    Raises:
        BadCase: a picture or mask that cannot be opened.
        PromptRejected, PromptFailed, PromptInterrupted, PromptTimedOut: as the server says.
    """
    compared = [source]
    if case.references:
        # As an encoder looks at them: the middle, as wide as the edit.
        compared = [
            ImageOps.fit(opened(path), edited.size, Image.Resampling.LANCZOS)
            for path in case.references
        ]
    mask = None if case.references else case.mask_at(source.size)
    graph = NodeGraph()
    batch = _loaded(client, graph, compared)
    edits = _loaded(client, graph, [edited])
    if len(compared) > 1:
        edits = graph.add("RepeatImageBatch", image=edits, amount=len(compared))
    asked = {**_networks(graph, judges), **_mask(client, graph, mask), "lpips": judges.lpips}
    found = _scored(graph, batch, edits, case.source_prompt, case.target_prompt, asked)
    shown = graph.add("PreviewAny", source=found.out(6))
    return _mean(client.run(graph.nodes, timeout=timeout)[shown.node_id]["text"][0])


def _scored(
    graph: NodeGraph, source: Wire, edited: Wire, before: str, after: str, asked: dict[str, Any]
) -> Wire:
    """An Edit Score of pictures, by their prompts and by what else is asked."""
    said = {"source_prompt": before, "target_prompt": after, "names": ""}
    asked = {**asked, "lpips": asked.get("lpips") or "none", "regions": "as published"}
    return graph.add("PinpointEditScore", source=source, edited=edited, **said, **asked)


def _networks(graph: NodeGraph, judges: Judges) -> dict[str, Wire]:
    wires = {}
    if judges.clip:
        wires["clip"] = graph.add("CLIPLoader", clip_name=judges.clip, type="stable_diffusion")
    encoders: dict[str, Wire] = {}
    for name in ("clip_vision", "dino", "identity"):
        file = getattr(judges, name)
        if file and file not in encoders:
            encoders[file] = graph.add(
                "PinpointLoadImageEncoder", file_name=file, activation="auto"
            )
        if file:
            wires[name] = encoders[file]
    return wires


def _loaded(client: Client, graph: NodeGraph, pictures: list[Image.Image]) -> Wire:
    """Pictures of one size as a batch."""
    first, *others = (graph.add("LoadImage", image=uploaded(client, p)) for p in pictures)
    for other in others:
        first = graph.add("ImageBatch", image1=first, image2=other)
    return first


def _mask(client: Client, graph: NodeGraph, mask: Image.Image | None) -> dict[str, Wire]:
    if mask is None:
        return {}
    name = uploaded(client, mask.convert("RGB"))
    return {"mask": graph.add("LoadImageMask", image=name, channel="red")}


def _mean(text: str) -> Scores:
    """The means of Edit Score's csv, of the rows in which a score is defined."""
    found: Scores = {}
    rows = list(csv.DictReader(io.StringIO(text)))
    for name in rows[0]:
        values = [float(row[name]) for row in rows if name != "name" and row[name]]
        if name != "name":
            found[name] = sum(values) / len(values) if values else None
    return found


def clip_words(
    client: Client,
    judges: Judges,
    picture: Image.Image,
    attributes: Mapping[str, list[str]],
    timeout: float,
) -> dict[str, str]:
    """Of each attribute, the phrase that a CLIP finds nearest to a picture.

    Zero-shot, as Radford et al., 2021.
    """
    graph = NodeGraph()
    seen = ImageOps.fit(picture, (clip_side, clip_side), Image.Resampling.BICUBIC)
    image = _loaded(client, graph, [seen])
    networks = _networks(graph, Judges(clip=judges.clip, clip_vision=judges.clip_vision))
    phrases = dict.fromkeys(phrase for values in attributes.values() for phrase in values)
    likeness = {
        phrase: graph.add(
            "PreviewAny", source=_scored(graph, image, image, "", phrase, networks).out(4)
        )
        for phrase in phrases
    }
    outputs = client.run(graph.nodes, timeout=timeout)
    found = {p: float(outputs[wire.node_id]["text"][0]) for p, wire in likeness.items()}
    return {name: max(values, key=found.__getitem__) for name, values in attributes.items()}


def attribute_scores(case: Case, before: Mapping[str, str], after: Mapping[str, str]) -> Scores:
    """Flux-Sculptor's AttrEdit and AttrPreserve (arXiv 2507.03979), 1 = all as it should be.

    Args:
        before, after: the phrases that source and edit show, by attribute; those of `after` count.
    """
    kept = [before[name] == shown for name, shown in after.items() if name != case.attribute]
    return {
        "attribute edited": float(after[case.attribute] == case.value),
        "attributes kept": sum(kept) / len(kept) if kept else None,
    }
