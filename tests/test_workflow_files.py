"""The example workflows as files: whole, readable, each node in its place."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from PIL import Image

from host.comfyui import PACK
from host.inprocess import Host
from host.options import REAL_WEIGHTS, WORKFLOWS
from host.workflows import NAMES, load

TITLE_HEIGHT = 30

every = pytest.mark.parametrize("name", NAMES)


def test_there_are_the_promised_ones() -> None:
    assert {
        *("focusflow", "focusflow_parts", "flowedit", "sdedit"),
        *("flux_sculptor", "flux_sculptor_parts", "flux_sculptor_two_attributes", "rf_edit"),
        *("attention_mask_focusflow_sd3", "inversion_reconstruction", "prompt_to_prompt"),
        *("learn_identity", "identity_edits", "makeup_transfer", "two_people"),
        *("flexip_subject", "flexip_gamma", "flexip_edit", "flexip_two_subjects", "train_flexip"),
        *("repair_edit", "edit_scores"),
        *REAL_WEIGHTS,
    } == set(NAMES)


def test_every_node_of_ours_is_in_a_workflow(host: Host) -> None:
    """And all of them are run, in `test_workflows` or in `test_real_workflows`."""
    used = {node["type"] for name in NAMES for node in load(name)["nodes"]}
    ours = {
        node_id
        for node_id, node in host.nodes.items()
        if getattr(node, "RELATIVE_PYTHON_MODULE", "") == "custom_nodes.pinpoint"
    }
    assert ours <= used


@every
def test_thumbnail(name: str) -> None:
    file = WORKFLOWS / f"{name}.jpg"
    assert Image.open(file).size == (512, 512)
    assert file.stat().st_size <= 60_000


@every
def test_links_are_known_at_both_ends(name: str) -> None:
    workflow = load(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"])
    assert len(links) == len(workflow["links"])
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(links)
    for link, source, slot, target, place, kind in links.values():
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert link in output["links"]
        assert entry["link"] == link
        assert kind == output["type"] == entry["type"]
    ends = [i["link"] for node in nodes.values() for i in node["inputs"] if i["link"] is not None]
    starts = [i for node in nodes.values() for o in node["outputs"] for i in o["links"] or ()]
    assert sorted(ends) == sorted(starts) == sorted(links)


@every
def test_nodes_say_where_they_come_from(name: str) -> None:
    project = (PACK / "pyproject.toml").read_text("utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    for node in load(name)["nodes"]:
        properties = node["properties"]
        if node["type"] == "MarkdownNote":
            continue
        assert properties["Node name for S&R"] == node["type"]
        if node["type"].startswith("Pinpoint"):
            assert (properties["cnr_id"], properties["ver"]) == ("pinpoint", version)
        else:
            assert properties["cnr_id"] == "comfy-core"


@every
def test_nodes_do_not_overlap(name: str) -> None:
    for a, b in combinations(load(name)["nodes"], 2):
        apart = [
            a["pos"][axis] + a["size"][axis] + margin <= b["pos"][axis]
            or b["pos"][axis] + b["size"][axis] + margin <= a["pos"][axis]
            for axis, margin in ((0, 0), (1, TITLE_HEIGHT))
        ]
        assert any(apart), f"{a['type']} {a['id']} and {b['type']} {b['id']}"


@every
def test_every_node_is_in_one_group_or_is_the_note(name: str) -> None:
    workflow = load(name)
    for node in workflow["nodes"]:
        left, top = node["pos"][0], node["pos"][1] - TITLE_HEIGHT
        right, bottom = left + node["size"][0], node["pos"][1] + node["size"][1]
        around = [
            group
            for group in workflow["groups"]
            for x, y, width, height in [group["bounding"]]
            if x <= left and y <= top and right <= x + width and bottom <= y + height
        ]
        assert len(around) == (0 if node["type"] == "MarkdownNote" else 1), node["type"]


@every
def test_a_note_tells_what_to_do_and_where_the_model_goes(name: str) -> None:
    (note,) = (node for node in load(name)["nodes"] if node["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert text.startswith(f"## {note['title']}\n")
    assert re.search(r"\*\*[^*]+\?\*\*", text), "a question with an answer"
    assert "**Model.**" in text or "**Models.**" in text
