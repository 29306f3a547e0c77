"""The example workflows, run by a real server; `test_workflow_files` looks at them unrun."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from host.cases import REFERENCE_SEED, drawn_case, drawn_pictures, upload, write_people
from host.prompts import Graph
from host.server import Server
from host.workflows import DEMOS, NAMES, Pictures, load, run

RECONSTRUCTION = "inversion_reconstruction"
"""The workflow that edits nothing."""
SEVERAL_EDITS = "identity_edits"
TWO_PEOPLE = "two_people"
SUBJECT, DIAL, TWO_SUBJECTS = "flexip_subject", "flexip_gamma", "flexip_two_subjects"
TRAINING = "train_flexip"
REPAIR, SCORES = "repair_edit", "edit_scores"
OTHERS = (
    *(RECONSTRUCTION, SEVERAL_EDITS, TWO_PEOPLE),
    *(SUBJECT, DIAL, TWO_SUBJECTS, TRAINING, SCORES),
)
EDITS = [name for name in DEMOS if name not in OTHERS]
"""Those that make one edit of the demo portrait."""
TEXTS = ("CLIPTextEncode", "PrimitiveStringMultiline")

every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def pictures(server: Server) -> Callable[[str], Pictures]:
    """A function from a demo workflow to what it saves for the demo portrait.

    The pictures go by the last part of their prefix.
    """
    drawn = drawn_pictures()
    assert upload(server, drawn) == list(drawn)
    write_people(server.base / "input")
    return cache(lambda name: run(server, name, learn_little))


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """The demo portrait."""
    return np.asarray(drawn_case(0).image)


def learn_little(graph: Graph) -> None:
    """Learning as the workflows do it takes minutes; tests/bench/identity.py measures it."""
    for node in graph.values():
        if node["class_type"] == "PinpointLearnIdentity":
            steps = {widget: min(node["inputs"][widget], 4) for widget in ("token_steps", "steps")}
            node["inputs"].update(steps, attributes="hair, hat")
        if node["class_type"] == "PinpointTrainFlexIP":
            node["inputs"]["steps"] = 4


@pytest.mark.parametrize("name", DEMOS)
def test_prompts_are_those_of_the_demo_portrait(server: Server, name: str) -> None:
    case = drawn_case(0, name)
    prompts = {"Source prompt": case.source_prompt, "Target prompt": case.target_prompt}
    others = {"Class prompt", "Reference prompt", "Reference prompt with other lips"}
    others |= {"Right: before", "Right: after", "Right: prompt"}
    nodes = load(name)["nodes"]
    written = {n["title"]: n["widgets_values"][0] for n in nodes if n["type"] in TEXTS}
    for title, text in written.items():
        role, _, change = title.removeprefix("Encode: ").capitalize().partition(":")
        if change and role == "Target prompt":
            assert differences(case.source_prompt, text) == 1, title
        elif title not in others:
            # An encoder of a linked prompt shows the same text.
            assert text == {**prompts, "Negative prompt": ""}[role], title
    both = {"source_prompt": case.source_prompt, "target_prompt": case.target_prompt}
    graph = server.convert(load(name))
    for node in graph.values():
        for widget, prompt in both.items():
            given = node["inputs"].get(widget, prompt)
            source = graph[given[0]] if isinstance(given, list) else None
            if source is None or source["_meta"]["title"] not in others:
                assert prompt == (source["inputs"]["value"] if source else given)


def differences(source: str, target: str) -> int:
    """How many phrases of two prompts differ."""
    pairs = zip(source.split(", "), target.split(", "), strict=True)
    return sum(before != after for before, after in pairs)


@pytest.mark.parametrize("name", ["makeup_transfer", TWO_PEOPLE])
def test_prompts_of_the_reference_are_its_own(name: str) -> None:
    own = drawn_case(REFERENCE_SEED).source_prompt
    nodes = {node.get("title"): node for node in load(name)["nodes"]}
    texts = {"Reference prompt": 0, "Reference prompt with other lips": 1}
    texts |= {"Right: before": 0, "Right: after": 1}
    for title, changed in texts.items():
        if title in nodes:
            (text,) = nodes[title]["widgets_values"]
            assert differences(own, text.replace("<bea>", "person")) == changed


def widget_values(inputs: dict[str, Any]) -> int:
    """How many values the web page saves for a node's widgets."""
    kinds = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    count = 0
    for section in ("required", "optional"):
        for kind, *options in inputs.get(section, {}).values():
            if isinstance(kind, list) or kind in kinds:
                extras = options[0] if options else {}
                # A seed has a second widget, and so has a picture that can be uploaded.
                count += 1 + bool(extras.get("control_after_generate"))
                count += bool(extras.get("image_upload"))
    return count


@every
def test_every_input_gets_a_value(server: Server, name: str) -> None:
    """Widgets are saved by position: a value too many or too few gives the rest to the wrong."""
    known = server.object_info()
    graph = server.convert(load(name))
    for node in load(name)["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        declared = known[node["type"]]["input"]
        assert len(node["widgets_values"]) == widget_values(declared), node["type"]
        given = graph[str(node["id"])]["inputs"]
        optional = declared.get("optional", {})
        assert declared["required"].keys() <= given.keys(), node["type"]
        assert given.keys() <= declared["required"].keys() | optional.keys(), node["type"]


@pytest.mark.parametrize("name", EDITS)
def test_demo_workflow_edits_the_portrait(
    pictures: Callable[[str], Pictures], portrait: np.ndarray, name: str
) -> None:
    saved = pictures(name)
    assert np.array_equal(saved["source"], portrait)
    assert all(picture.shape == portrait.shape for picture in saved.values())
    difference = np.abs(saved["edit"].astype(int) - portrait)
    assert difference.max() > 60, "something was edited"
    if "mask" in saved:
        # Saving rounds down, so that 24 is below the composite's threshold of 0.1.
        outside = saved["mask"][..., 0] <= 24
        assert 0 < outside.mean() < 1
        assert difference[outside].max() == 0


def test_each_edit_of_someone_learned_changes_one_thing(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved = pictures(SEVERAL_EDITS)
    assert saved.keys() == {"source", "hair", "glasses", "expression"}
    middle = len(portrait) // 4
    for kind, rows in {"hair": slice(middle), "glasses": slice(middle, -middle)}.items():
        difference = np.abs(saved[kind].astype(int) - portrait)
        assert difference[rows].max() > 60
        assert (difference == 0).mean() > 0.5


def test_two_people_are_changed_each_in_their_half(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved, side = pictures(TWO_PEOPLE), portrait.shape[1]
    assert np.array_equal(saved["source"][:, :side], portrait)
    difference = np.abs(saved["edit"].astype(int) - saved["source"])
    hats = difference[: side // 2]
    assert hats[:, :side].max() > 60
    assert hats[:, side:].max() > 60
    assert (difference == 0).mean() > 0.5


def test_each_person_is_made_anew_in_their_half(
    server: Server, pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    def exchanged(graph: Graph) -> None:
        one, other = (
            node["inputs"]
            for node in graph.values()
            if node["class_type"] == "PinpointIdentityHook"
        )
        one["identity"], other["identity"] = other["identity"], one["identity"]

    side = portrait.shape[1]
    outcomes = pictures(TWO_PEOPLE), run(server, TWO_PEOPLE, exchanged)
    for half in (slice(side), slice(side, None)):
        own, foreign = (
            np.abs(saved["anew"].astype(int) - saved["source"])[:, half].mean()
            for saved in outcomes
        )
        assert own < 0.7 * foreign


def test_makeup_is_learned_from_the_lips(server: Server) -> None:
    def with_mask(graph: Graph) -> None:
        learn_little(graph)
        (lesson,) = (n for n in graph.values() if n["class_type"] == "PinpointLearnIdentity")
        for key, class_type, inputs in (
            ("1001", "MaskToImage", {"mask": lesson["inputs"]["mask"]}),
            ("1002", "SaveImage", {"images": ["1001", 0], "filename_prefix": "pinpoint/mask"}),
        ):
            graph[key] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": key}}

    saved = run(server, "makeup_transfer", with_mask)
    red, green, blue = np.moveaxis(saved["reference"].astype(int), -1, 0)
    lips, mask = (red > 180) & (green < 90) & (blue < 90), saved["mask"][..., 0] > 127
    assert 50 < lips.sum() < 500
    assert mask[lips].mean() > 0.8
    assert mask.mean() < 0.06


def test_a_subject_is_put_into_a_new_picture(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved, side = pictures(SUBJECT), portrait.shape[1]
    assert np.array_equal(saved["subject"], portrait)
    # The same seed, prompt and gamma as in the middle of the dial.
    middle = pictures(DIAL)["gamma_0_to_1"][:, 2 * side : 3 * side]
    assert np.array_equal(saved["edit"], middle)


def test_the_dial_turns_from_prompt_to_subject(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved, side = pictures(DIAL), portrait.shape[1]
    assert np.array_equal(saved["subject"], portrait)
    row = saved["gamma_0_to_1"].astype(int)
    assert row.shape == (side, 5 * side, 3)
    at = [row[:, i * side : (i + 1) * side] for i in range(5)]
    steps = [np.abs(b - a).mean() for a, b in pairwise(at)]
    assert min(steps) > 0.5, "each turn of the dial shows"
    # The prompt asks for other colours, so the subject's own come as the dial is turned.
    distances = [np.abs(picture - portrait).mean() for picture in at]
    assert distances[-1] < distances[0]


def test_two_subjects_are_made_each_in_their_half(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved, side = pictures(TWO_SUBJECTS), portrait.shape[1]
    assert np.array_equal(saved["left"], portrait)
    both = saved["both"].astype(int)
    assert both.shape == (side, 2 * side, 3)
    assert np.abs(both[:, :side] - both[:, side:]).mean() > 20
    # The prompts ask for a yellow and for an orange background.
    left, right = both[:8, :8].mean((0, 1)), both[:8, -8:].mean((0, 1))
    assert left[1] > right[1] + 20


def test_an_adapter_is_trained_and_used(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved = pictures(TRAINING)
    assert saved.keys() == {"subject", "picture"}
    assert saved["picture"].shape == portrait.shape
    assert saved["picture"].std() > 5


def test_an_editors_picture_is_repaired(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved = pictures(REPAIR)
    moved, repaired = (
        np.abs(saved[name].astype(int) - portrait).max(2) for name in ("editors_picture", "edit")
    )
    assert (moved > 12).mean() > 0.2, "the editor's picture is off nearly everywhere"
    assert (repaired == 0).mean() > 0.6
    hat = slice(len(portrait) * 2 // 5)
    assert (repaired[hat] > 60).mean() > 0.1


def test_edits_are_scored_side_by_side(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved = pictures(SCORES)
    assert np.array_equal(saved["source"], portrait)
    height, width, _ = saved["comparison"].shape
    assert width > 2 * len(portrait)
    assert height > 2 * (len(portrait) + 4 * 12), "two rows with four lines of scores"


@pytest.mark.parametrize("name", ["focusflow", "flux_sculptor"])
def test_the_one_node_way_calls_the_parts(pictures: Callable[[str], Pictures], name: str) -> None:
    whole, parts = pictures(name), pictures(f"{name}_parts")
    assert np.array_equal(whole["mask"], parts["mask"])
    assert np.array_equal(whole["edit"], parts["edit"])


def test_two_changes_are_made_in_two_places(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    def rows_changed(name: str) -> np.ndarray:
        edit = pictures(name)["edit"].astype(int)
        return (np.abs(edit - portrait) > 60).any((1, 2))

    one, two = rows_changed("flux_sculptor"), rows_changed("flux_sculptor_two_attributes")
    hat, shirt = slice(len(portrait) * 2 // 5), slice(-8, None)
    assert one[hat].any()
    assert not one[shirt].any()
    assert two[hat].any()
    assert two[shirt].any()


def test_both_ways_to_noise_lead_back_to_the_portrait(
    pictures: Callable[[str], Pictures], portrait: np.ndarray
) -> None:
    saved = pictures(RECONSTRUCTION)
    one_node, samplers = (saved[name].astype(int) for name in ("one_node", "stock_samplers"))
    assert np.abs(one_node - samplers).max() <= 3
    # The rest of the error is the VAE's.
    assert np.square(one_node - portrait).mean() < 30


def test_seeds_are_kept(server: Server) -> None:
    """A published result stays the same when it is run again."""
    for name in NAMES:
        for node in load(name)["nodes"]:
            assert "randomize" not in node.get("widgets_values", ()), f"{name}: {node['type']}"
        graph = server.convert(load(name))
        for node in graph.values():
            assert "control_after_generate" not in node["inputs"]
