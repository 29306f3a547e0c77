"""How a case gets into a workflow: its picture, its prompts and its seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cases import REFERENCE, Case
from .prompts import Graph

Place = tuple[dict[str, Any], str]
"""A node's inputs, and the name of one that is not linked."""
PROMPTS = {"Source prompt": "source_prompt", "Target prompt": "target_prompt"}
"""Title of a node that holds one prompt -> widget of a node that holds both."""
INSTRUCTION = "Instruction"
"""Title of a node that holds what models of instructions are told."""
PICTURE = "Source picture"
"""Title of the Load Image for the picture, where there are several."""
_texts = (
    *("text", "value", "string", "prompt", "clip_l", "clip_g", "t5xxl", "llama"),
    *("text_l", "text_g"),
)
"""Widgets that nodes hold a prompt in."""
_seeds = ("seed", "noise_seed")
_numbers = (*_seeds, "value", "int", "number")
"""Widgets that a linked seed comes from."""


class CaseError(Exception):
    """A workflow has no place for a picture, a prompt or a seed; the message says which."""


def fill_in(
    graph: Graph, case: Case, image_name: str, seed: int | None = None, *, strict: bool = False
) -> list[str]:
    """Put the picture, the prompts and, if one is given, the seed into a workflow's nodes.

    A prompt goes into every text of the nodes that are titled "Source prompt" or "Target prompt",
    and into every widget called source_prompt or target_prompt; an instruction into nodes titled
    "Instruction". What is linked is written where it comes from.

    Args:
        strict: whether a workflow has to have places for the seed and for the target prompt or an
            instruction, so that the edit is the case's and no other.

    Returns:
        The prompts that the workflow has a place for, as lines of text.

    Raises:
        CaseError: no node for the picture, none for any prompt, a titled node without a text that
            can be written, or what `strict` asks for.
    """
    _loader(graph)["inputs"]["image"] = image_name
    filled = []
    for title, prompt in _asked(case).items():
        places = _of_titled(graph, title)
        if title in PROMPTS:
            places += _named(graph, (PROMPTS[title],), _texts, str)
        if places and not prompt and strict:
            raise CaseError(f"The workflow needs the case's {title}, which is empty: write one")
        for inputs, name in places:
            inputs[name] = prompt
        if places:
            filled.append(f"{title.split()[0]}: {prompt}")
    said = {line.partition(":")[0] for line in filled}
    if strict and not said & {"Target", INSTRUCTION}:
        raise CaseError(f"The workflow needs a node titled 'Target prompt' or {INSTRUCTION!r}")
    if not filled:
        raise CaseError(f"The workflow needs a node titled {' or '.join(map(repr, PROMPTS))}")
    if seed is not None:
        seeds = _named(graph, _seeds, _numbers, int)
        if strict and not seeds:
            raise CaseError(_without_seed(graph))
        for inputs, name in seeds:
            inputs[name] = seed
    return filled


def _asked(case: Case) -> dict[str, str]:
    """What is written, by the title of its nodes."""
    prompts = {title: getattr(case, name) for title, name in PROMPTS.items()}
    return {**prompts, INSTRUCTION: case.instruction}


def _loader(graph: Graph) -> dict[str, Any]:
    """The node that loads the picture."""
    loaders = [
        node
        for node in graph.values()
        if node["class_type"] == "LoadImage" and node["inputs"].get("image") != REFERENCE
    ]
    titled = [node for node in loaders if _is(node, PICTURE)]
    if len(titled or loaders) != 1:
        raise CaseError(
            f"The workflow needs one node LoadImage for the picture, it has "
            f"{len(titled or loaders)}: give the title {PICTURE!r} to that one alone"
        )
    return (titled or loaders)[0]


def _of_titled(graph: Graph, title: str) -> list[Place]:
    """The texts of the nodes with a title."""
    found = []
    for key, node in graph.items():
        if _is(node, title):
            places = [place for name in _texts for place in _written(graph, key, name, _texts, str)]
            if not places:
                raise CaseError(
                    f"{_called(graph, key)} has no text that can be written: give its title to "
                    "the node that its text comes from"
                )
            found += places
    return found


def _named(
    graph: Graph, names: tuple[str, ...], sources: tuple[str, ...], kind: type
) -> list[Place]:
    """The widgets with a name in any node."""
    return [
        place
        for key in graph
        for name in names
        for place in _written(graph, key, name, sources, kind)
    ]


def _written(
    graph: Graph,
    key: str,
    name: str,
    sources: tuple[str, ...],
    kind: type,
    seen: frozenset[str] = frozenset(),
) -> Iterator[Place]:
    """Where an input is written: there or, where it is linked, in `sources` of what it comes from.

    A node reached by a link that takes none of `sources` by itself has no place.
    """
    inputs = graph[key]["inputs"]
    value = inputs.get(name)
    if isinstance(value, kind):
        yield inputs, name
    elif isinstance(value, list) and value[0] in graph and key not in seen:
        for source in sources:
            yield from _written(graph, value[0], source, sources, kind, seen | {key})


def _without_seed(graph: Graph) -> str:
    linked = [
        _called(graph, node["inputs"][name][0])
        for node in graph.values()
        for name in _seeds
        if isinstance(node["inputs"].get(name), list) and node["inputs"][name][0] in graph
    ]
    where = f": it comes from {linked[0]}, which has none" if linked else ""
    return f"The workflow has no seed to set{where}; add a node with one, such as Random Noise"


def _is(node: dict[str, Any], title: str) -> bool:
    return node["_meta"]["title"].strip().lower() == title.lower()


def _called(graph: Graph, key: str) -> str:
    """A node for people."""
    node = graph[key]
    return f"{node['class_type']} ({key}), titled {node['_meta']['title']!r}"
