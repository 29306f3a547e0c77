"""Help pages, tooltips and translations say something about every input and output."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from host.comfyui import PACK
from host.inprocess import Host
from host.node_ids import NODES
from host.server import Server

LOCALES = sorted(folder.name for folder in (PACK / "locales").iterdir())
HEADINGS = (
    "Where it goes",
    "Inputs",
    "Outputs",
    "Choosing settings",
    "Published and ours",
    "Limits",
    "Errors",
    "Source",
)

nodes = pytest.mark.parametrize("node_id", NODES)
locales = pytest.mark.parametrize("locale", LOCALES)


def schema(host: Host, node_id: str) -> Any:
    return host.nodes[node_id].GET_SCHEMA()  # type: ignore[attr-defined]


def output_name(output: Any) -> str:
    """What the web page writes beside an output."""
    return output.display_name or output.io_type


def page(node_id: str) -> str:
    return (PACK / "web" / "docs" / f"{node_id}.md").read_text("utf-8")


def section(node_id: str, heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page(node_id), re.DOTALL | re.MULTILINE)
    assert found, f"{node_id} has no section {heading}"
    return found[1]


def table(node_id: str, heading: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    rows = [line for line in section(node_id, heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def translation(locale: str) -> dict[str, Any]:
    return json.loads((PACK / "locales" / locale / "nodeDefs.json").read_text("utf-8"))


def sentences_in_code() -> str:
    """All text in the pack's sources, with the gaps of f-strings left out."""
    files = [*(PACK / "nodes").rglob("*.py"), *(PACK / "kernels").rglob("*.py")]
    trees = [ast.parse(file.read_text("utf-8")) for file in files]
    constants = [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)
    ]
    return "\n".join(node.value for node in constants if isinstance(node.value, str))


def test_all_nodes_are_looked_at(host: Host) -> None:
    ours = {
        node_id
        for node_id, node in host.nodes.items()
        if getattr(node, "RELATIVE_PYTHON_MODULE", "") == "custom_nodes.pinpoint"
    }
    assert ours == set(NODES)
    assert {file.stem for file in (PACK / "web" / "docs").iterdir()} == ours


# The schemas


@nodes
def test_description_is_one_sentence(host: Host, node_id: str) -> None:
    description = schema(host, node_id).description
    assert description[0].isupper()
    assert description.endswith(".")
    assert ". " not in description


@nodes
def test_every_input_and_output_has_a_tooltip(host: Host, node_id: str) -> None:
    known = schema(host, node_id)
    for part in (*known.inputs, *known.outputs):
        assert part.tooltip, part
        assert part.tooltip[-1] in ".…", part.tooltip


# The help pages


@nodes
def test_page_has_all_sections(host: Host, node_id: str) -> None:
    text = page(node_id)
    assert text.startswith(f"# {schema(host, node_id).display_name}\n")
    assert tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) == HEADINGS
    for heading in HEADINGS:
        assert section(node_id, heading).strip()


@nodes
def test_page_lists_the_inputs_and_outputs(host: Host, node_id: str) -> None:
    known = schema(host, node_id)
    inputs = {name.strip("`"): text for name, text in table(node_id, "Inputs")}
    assert list(inputs) == [part.id for part in known.inputs]
    outputs = {name.strip("`"): text for name, text in table(node_id, "Outputs")}
    assert list(outputs) == [output_name(part) for part in known.outputs]
    for part in known.inputs:
        assert inputs[part.id].startswith("Optional.") == part.optional, part.id


@nodes
def test_page_gives_the_true_defaults(host: Host, node_id: str) -> None:
    """A number in brackets at the end of an input's first sentence is its default."""
    listed = {name.strip("`"): text for name, text in table(node_id, "Inputs")}
    for part in schema(host, node_id).inputs:
        stated = re.search(r"\(([\d.]+)( = off)?\)", listed[part.id])
        if stated:
            assert float(stated[1]) == part.default, part.id


@nodes
def test_page_names_only_widgets_that_exist(host: Host, node_id: str) -> None:
    existing = {part.id for name in NODES for part in schema(host, name).inputs}
    existing |= {output_name(part) for name in NODES for part in schema(host, name).outputs}
    # Inputs of the stock nodes that the pages tell to connect.
    existing |= {"guider", "sampler", "sigmas", "noise", "latent_image", "hooks"}
    assert set(re.findall(r"`([^`]+)`", page(node_id))) <= existing


@nodes
def test_page_quotes_errors_that_exist(node_id: str) -> None:
    """What stands between the gaps (…) of a quoted message stands in the code, too."""
    code = sentences_in_code()
    rows = table(node_id, "Errors")
    assert rows
    for message, cure in rows:
        assert cure
        for part in message.strip("*").split("…"):
            assert part.strip() in code, message


FAMILIES = {
    "Flux": ("Flux.1", "Flux.2"),
    "Chroma": ("Chroma",),
    "MMDiT": ("SD3", "SD3.5"),
    "QwenImageTransformer2DModel": ("Qwen-Image",),
    "NextDiT": ("Z-Image", "Lumina 2"),
    "WanModel": ("Wan",),
    "UNetModel": ("SD1.5", "SDXL"),
}
"""Class of the diffusion model -> names under which people know it."""


def test_pages_list_the_families_whose_attention_is_known(host: Host) -> None:
    layouts = host.pack.nodes.host.layouts.LAYOUTS
    assert {kind.__name__ for kind in layouts} == set(FAMILIES)
    known = {", ".join(names) for names in FAMILIES.values()}
    for node_id in ("PinpointAttentionMask", "PinpointInjectValues"):
        assert {row[0] for row in table(node_id, "Limits")} == known


# The translations


@locales
def test_translation_is_complete(host: Host, locale: str) -> None:
    translated = translation(locale)
    assert set(translated) == set(NODES)
    for node_id in NODES:
        known, said = schema(host, node_id), translated[node_id]
        assert said["display_name"]
        assert said["description"]
        assert list(said["inputs"]) == [part.id for part in known.inputs]
        assert list(said["outputs"]) == [str(slot) for slot in range(len(known.outputs))]
        for part in (*said["inputs"].values(), *said["outputs"].values()):
            assert part["name"]
            assert part["tooltip"]
            assert part["tooltip"][-1] in ".。…", part["tooltip"]


@locales
def test_translation_keeps_the_numbers(host: Host, locale: str) -> None:
    def numbers(text: str) -> list[str]:
        return sorted(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1.\2", text)))

    for node_id in NODES:
        said = translation(locale)[node_id]["inputs"]
        for part in schema(host, node_id).inputs:
            assert numbers(said[part.id]["tooltip"]) == numbers(part.tooltip), part.id


# On a server


@nodes
def test_page_is_served_where_the_web_page_looks(server: Server, node_id: str) -> None:
    answer = server.get(f"/extensions/pinpoint/docs/{node_id}.md")
    assert answer.ok
    assert answer.content.decode("utf-8") == page(node_id)


def test_translations_are_served(server: Server) -> None:
    served = server.get("/i18n").json()
    for locale in LOCALES:
        assert translation(locale).items() <= served[locale]["nodeDefs"].items()


def test_workflows_are_served_with_their_thumbnails(server: Server) -> None:
    names = server.get("/workflow_templates").json()["pinpoint"]
    assert set(names) == {file.stem for file in Path(PACK / "workflows").glob("*.json")}
    for name in names:
        assert server.get(f"/api/workflow_templates/pinpoint/{name}.jpg").ok
