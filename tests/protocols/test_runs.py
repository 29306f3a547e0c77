"""What a run makes, and what it takes from runs before it; on a server that is made up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image

from host.client import PromptTimedOut
from host.prompts import Graph, Outputs
from protocols import judging, page, report
from protocols.cases import Case, Protocol, ProtocolError
from protocols.judging import Judges
from protocols.running import Method
from protocols.runs import Job, Run
from protocols.store import Store

GRAPH: Graph = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {
        "class_type": "Edit",
        "inputs": {"image": ["1", 0], "text": "", "seed": 0},
        "_meta": {"title": "Target prompt"},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
}
PROTOCOL = Protocol("made-up", [], ("whole psnr", "clip whole"))
CLIP = Judges(clip="l.safetensors", clip_vision="l.safetensors")


class MadeUp:
    """A client of no server: edits are black, and every phrase is as near as it is told.

    Attributes:
        edits, scores: how many have been made.
        slow, lost: target prompts of which edits take too long, or save no picture.
    """

    def __init__(self, likeness: dict[str, float] | None = None) -> None:
        self.likeness = likeness or {}
        self.edits = self.scores = 0
        self.names: list[str] = []
        self.slow: set[str] = set()
        self.lost: set[str] = set()
        self.messages: list[Any] = []

    def upload_image(self, name: str, _content: bytes) -> str:
        self.names.append(name)
        return name

    def queue(self, graph: Graph) -> str:
        self.edits += 1
        return graph["2"]["inputs"]["text"]

    def wait(self, prompt_id: str, timeout: float) -> Outputs:
        if prompt_id in self.slow:
            raise PromptTimedOut(f"{prompt_id} took longer than {timeout:.0f} s")
        if prompt_id in self.lost:
            return {}
        return {"3": {"images": [{"filename": "edit.png"}]}}

    def history(self, _prompt_id: str) -> dict[str, Any]:
        return {"status": {"messages": self.messages}}

    def view(self, filename: str) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "PNG", title=filename)
        return buffer.getvalue()

    def run(self, graph: Graph, timeout: float) -> Outputs:
        assert timeout == 60
        shown = {}
        for key, node in graph.items():
            if node["class_type"] == "PreviewAny":
                score, slot = node["inputs"]["source"]
                said = graph[score]["inputs"]["target_prompt"]
                text = "name,whole psnr\n1,20\n" if slot == 6 else str(self.likeness[said])
                shown[key] = {"text": [text]}
        self.scores += 1
        return shown


@pytest.fixture
def method(tmp_path: Path) -> Callable[..., Method]:
    def make(name: str = "edit", **inputs: Any) -> Method:
        graph = json.loads(json.dumps(GRAPH))
        graph["2"]["inputs"] |= inputs
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"prompt": graph}), "utf-8")
        return Method.of(client_of(MadeUp()), file)

    return make


def client_of(client: MadeUp) -> Any:
    return client


def cases(folder: Path, count: int) -> list[Case]:
    found = []
    for number in range(count):
        picture = folder / f"{number}.png"
        if not picture.exists():
            Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(picture)
        found.append(Case(str(number), picture, "a cat", f"a dog {number}"))
    return found


def go(
    client: MadeUp, folder: Path, methods: Sequence[Method], found: list[Case], **changes: Any
) -> tuple[Run, list[Job]]:
    """Run all, and give the counts of edits and scores to the client."""
    protocol = replace(PROTOCOL, cases=found, attributes=changes.pop("attributes", {}))
    run = Run(protocol, Store(folder / "out"), Judges(), seed=1, size=None, timeout=60)
    run = replace(run, **changes)
    jobs = run.jobs(methods)
    client.edits = client.scores = 0
    run.edit(client_of(client), jobs)
    run.score(client_of(client), jobs)
    return run, jobs


def test_only_what_changed_is_made_again(method: Callable[..., Method], tmp_path: Path) -> None:
    client, one = MadeUp(), method()
    many = cases(tmp_path, 3)

    def made(methods: Sequence[Method], found: list[Case], **changes: Any) -> tuple[int, int]:
        go(client, tmp_path, methods, found, **changes)
        return client.edits, client.scores

    assert made([one], many[:2]) == (2, 2)
    assert made([one], many[:2]) == (0, 0)
    assert made([one], many) == (1, 1), "one case more"
    assert made([one, method("other")], many) == (3, 3), "one method more"
    assert made([one], many, judges=Judges(dino="a")) == (0, 3), "other judges"
    assert made([one], many, seed=2) == (3, 3)
    assert made([one], many, size=8) == (3, 3)
    assert made([method(steps=9)], many) == (3, 3), "a mended workflow"
    assert made([one], many) == (0, 0), "and back"
    assert made([one], [replace(many[0], target_prompt="a bird"), *many[1:]]) == (1, 1)
    assert made([one], [replace(many[0], mask=lambda size: Image.new("L", size))]) == (0, 1)
    Image.new("RGB", (16, 16), (0, 0, 99)).save(many[1].image)
    assert made([one], many) == (1, 1), "another picture of the same name"


def test_a_case_that_takes_too_long_is_a_row(method: Callable[..., Method], tmp_path: Path) -> None:
    client = MadeUp()
    client.slow, client.lost = {"a dog 0"}, {"a dog 1"}
    run, jobs = go(client, tmp_path, [method()], cases(tmp_path, 3))
    late, lost, made = run.rows(jobs)
    assert lost["error"] == "edit saves 0 pictures: a case needs one"
    assert late["error"] == "a dog 0 took longer than 60 s"
    assert made["scores"]["whole psnr"] == 20


def test_what_was_stopped_is_shown_as_far_as_it_is(
    method: Callable[..., Method], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, jobs = go(MadeUp(), tmp_path, [method()], cases(tmp_path, 2))
    (tmp_path / "out" / "scores.jsonl").write_text("", "utf-8")
    report.write(run, jobs, "python protocol.py")
    shown = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert shown.count("alt=edit width=256 loading=lazy") == 2
    assert "Over the 0 of 2 cases" in capsys.readouterr().out


def test_pictures_have_names_of_their_own(method: Callable[..., Method], tmp_path: Path) -> None:
    client = MadeUp()
    go(client, tmp_path, [method()], cases(tmp_path, 2))
    # Two sources, and of each the source and the black edit, of which the first source is one.
    assert len(set(client.names)) == 2
    assert all(name.startswith("pinpoint_protocol_") for name in client.names)


def test_seconds_are_the_server_s(method: Callable[..., Method], tmp_path: Path) -> None:
    client, found = MadeUp(), cases(tmp_path, 1)
    client.messages = [
        ["execution_start", {"timestamp": 1000}],
        ["execution_cached", {"nodes": ["1"]}],
        ["execution_success", {"timestamp": 3500}],
    ]
    run, jobs = go(client, tmp_path, [method()], found)
    assert run.rows(jobs)[0]["seconds"] == 2.5
    client.messages[1][1]["nodes"] = ["1", "2", "3"]
    run, jobs = go(client, tmp_path, [method("cached")], found)
    assert run.rows(jobs)[0]["seconds"] is None
    client.messages = []
    run, jobs = go(client, tmp_path, [method("old")], found)
    assert 0 <= run.rows(jobs)[0]["seconds"] < 1


def test_what_a_protocol_lacks_is_said(
    method: Callable[..., Method], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, jobs = go(MadeUp(), tmp_path, [method()], cases(tmp_path, 1))
    report.write(run, jobs, "")
    assert "not measured: clip whole (give --clip and --clip-vision)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        ("2", {"inputs": {"text": "", "image": ["1", 0]}}, "edit: The workflow has no seed to set"),
        ("2", {"_meta": {"title": "Prompt"}}, "edit: The workflow needs a node titled 'Target"),
        ("1", {"class_type": "Noise"}, "edit: The workflow needs one node LoadImage"),
        ("3", {"class_type": "Preview"}, "saves 0 pictures"),
    ],
)
def test_a_workflow_without_a_place_is_refused_before_a_run(
    node: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    graph = {**GRAPH, node: {**GRAPH[node], **changes}}
    file = tmp_path / "edit.json"
    file.write_text(json.dumps(graph), "utf-8")
    with pytest.raises(ProtocolError, match=message):
        Method.of(client_of(MadeUp()), file)


def test_a_mask_is_on_the_page(method: Callable[..., Method], tmp_path: Path) -> None:
    (one,) = cases(tmp_path, 1)
    one = replace(one, mask=lambda size: Image.new("L", size, 255))
    run, jobs = go(MadeUp(), tmp_path, [method()], [one])
    report.write(run, jobs, "")
    assert "<img src='masks/0.png' alt=mask" in (run.store.folder / "index.html").read_text("utf-8")
    assert Image.open(run.store.folder / "masks" / "0.png").size == (16, 16)


def test_addresses_are_quoted_and_reach_other_drives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "50 %" / "what?#.png"
    assert page.address(picture, tmp_path) == "50%20%25/what%3F%23.png"

    def refuse(*_: Any) -> str:
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(page.os.path, "relpath", refuse)
    assert page.address(picture, tmp_path) == picture.as_uri()


@pytest.mark.parametrize(
    "text", ["[]", "{}", "3", '{"a": 1}', '{"prompt": 1}', '{"nodes": 1}', "no JSON"]
)
def test_a_file_that_is_no_workflow_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "edit.json"
    file.write_text(text, "utf-8")
    client = client_of(MadeUp())
    client.convert = lambda said: convert_ui_to_api(said, {})
    with pytest.raises(ProtocolError, match=r"edit\.json (is no|cannot be) .*: (save|name)"):
        Method.of(client, file)


def test_a_row_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("edits", {"key": "1"})
    with (tmp_path / "edits.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "2", "ca')
    assert list(store.rows("edits")) == ["1"]
    store.add("edits", {"key": "2"})
    assert list(store.rows("edits")) == ["1", "2"]


def test_rows_survive_an_end_while_errors_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = Store(tmp_path), [{"key": "1"}, {"key": "2", "error": "out of memory"}]
    for row in rows:
        store.add("edits", row)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            store.forget_errors("edits")
    assert list(store.rows("edits").values()) == rows
    store.forget_errors("edits")
    assert list(store.rows("edits").values()) == rows[:1]


def test_a_clip_takes_the_nearest_phrase_and_sees_a_source_once(
    method: Callable[..., Method], tmp_path: Path
) -> None:
    attributes = {"hair": ["black hair", "red hair"], "mouth": ["a smile", "a straight face"]}
    client = MadeUp({"black hair": 0.21, "red hair": 0.26, "a smile": 0.3, "a straight face": 0.2})
    picture = Image.new("RGB", (64, 48))
    shown = judging.clip_words(client_of(client), CLIP, picture, attributes, 60)
    assert shown == {"hair": "red hair", "mouth": "a smile"}
    (case,) = cases(tmp_path, 1)
    case = replace(case, attribute="hair", value="red hair")
    before = {"hair": "black hair", "mouth": "a straight face"}
    assert judging.attribute_scores(case, before, shown) == {
        "attribute edited": 1.0,
        "attributes kept": 0.0,
    }
    methods = [method(), method("other")]
    go(client, tmp_path, methods, [case], judges=CLIP, attributes=attributes)
    assert client.scores == 2 + 2 + 1, "scores, words of each edit, words of the source"


def test_judges_that_a_server_has_not_are_named_before_a_run() -> None:
    known: dict[str, Any] = {
        "PinpointEditScore": {"input": {"required": {"lpips": ["COMBO", {"options": ["alex"]}]}}},
        "PinpointLoadImageEncoder": {"input": {"required": {"file_name": [["a", "b"], {}]}}},
        "CLIPLoader": {"input": {"required": {"clip_name": [["l"]]}}},
    }
    judging.require(Judges(lpips="alex", clip="l", clip_vision="a", dino="b"), known)
    with pytest.raises(ProtocolError, match=r"--clip-vision c is not in .*clip_vision: .* a, b"):
        judging.require(Judges(clip_vision="c"), known)
    with pytest.raises(ProtocolError, match="--lpips vgg is not in the networks"):
        judging.require(Judges(lpips="vgg"), known)
    with pytest.raises(ProtocolError, match="--clip l needs --clip-vision"):
        judging.require(Judges(clip="l"), known)
    with pytest.raises(ProtocolError, match="has no Edit Score: install Pinpoint"):
        judging.require(Judges(), {})
