"""Each protocol's command on a real server: run, interrupted, gone on with, and what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import protocol
from host.comfyui import PACK
from host.options import WORKFLOWS
from host.server import Server
from protocols import judging, running
from protocols.cases import Case, ProtocolError
from protocols.judging import Judges
from protocols.layouts import LAYOUTS
from protocols.store import Store

COUNT = 2
QUICKEST = {"subjects": "flexip_subject"}
Run = Callable[..., int]


@pytest.fixture
def run(server: Server, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command on the tests' server; with what is not given as for the shipped models."""

    def start(layout: str, output: Path, *more: str, count: int = COUNT) -> int:
        workflow = WORKFLOWS / f"{QUICKEST.get(layout, 'sdedit')}.json"
        line = ["protocol.py", layout, "--server", server.address, "--count", str(count)]
        line += ["--workflow", str(workflow), "--output", str(output)]
        line += ["--dino", "pinpoint_dino.safetensors", *more]
        monkeypatch.setattr(sys, "argv", line)
        return protocol.main()

    return start


def figures(output: Path) -> dict[str, Any]:
    """A summary without what a second run measures anew."""
    said = json.loads((output / "summary.json").read_text("utf-8"))
    for found in (said["all"], *said["groups"].values()):
        found[:] = [figure for figure in found if figure["score"] != "seconds"]
    return {key: said[key] for key in ("all", "groups", "errors")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_run_goes_on_to_the_same_summary(
    run: Run, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(layout, tmp_path / "whole") == 0
    expected = figures(tmp_path / "whole")
    assert expected["all"], "something is scored"
    edit, score, calls = running.Method.edit, judging.score, []

    def stopping(original: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(at)
            if calls.count(at) == at:
                raise KeyboardInterrupt
            return original(*args)

        return call

    monkeypatch.setattr(running.Method, "edit", stopping(edit, 2))
    monkeypatch.setattr(judging, "score", stopping(score, 1))
    assert run(layout, tmp_path / "parts") == 130
    assert run(layout, tmp_path / "parts") == 130
    made = len(calls)
    assert run(layout, tmp_path / "parts") == 0
    assert len(calls) == made + COUNT, "the edits that were made are only scored"
    assert figures(tmp_path / "parts") == expected
    page = (tmp_path / "parts" / "index.html").read_text("utf-8")
    assert page.count("alt=edit") == COUNT


def test_ctrl_c_stops_the_command_and_it_goes_on(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(PACK / "tests/bench/protocol.py"), "focusflow"]
    command += ["--server", server.address, "--count", "3", "--output", str(tmp_path)]
    command += ["--workflow", str(WORKFLOWS / "sdedit.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "1/3" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 130
    assert "Stopped; the same command goes on from here" in rest
    before = Store(tmp_path, json.loads((tmp_path / "run.json").read_text("utf-8"))).rows("edits")
    assert 1 <= len(before) < 3
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.count(" s\n") == 3 - len(before)
    assert "| whole psnr dB | sdedit | 3 |" in found


def test_a_bad_case_is_a_row_and_can_be_tried_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    data = protocol.drawn.focusflow(tmp_path / "data", 1, 4)
    picture = next((tmp_path / "data" / "images").glob("000*"))
    pixels = picture.read_bytes()
    picture.unlink()
    assert run("focusflow", output, str(data), count=4) == 0
    assert "sdedit: 2 errors" in capsys.readouterr().out
    assert "cannot be opened" in (output / "index.html").read_text("utf-8")
    assert {figure["count"] for figure in figures(output)["all"]} == {2}
    picture.write_bytes(pixels)
    assert run("focusflow", output, str(data), count=4) == 0
    assert figures(output)["errors"] == {"sdedit": 2}, "errors stay until asked"
    assert run("focusflow", output, str(data), "--retry", count=4) == 0
    assert figures(output)["errors"] == {"sdedit": 0}
    assert {figure["count"] for figure in figures(output)["all"]} == {4}


def test_another_run_is_not_mixed_in(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(tmp_path, {"layout": "focusflow", "seed": 1})
    assert run("focusflow", tmp_path) == 1
    assert "holds a run with another" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("focusflow", tmp_path, "--server", "http://127.0.0.1:9") == 1
    assert "No ComfyUI answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_workflows_of_one_name_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "sdedit.json"
    assert run("focusflow", tmp_path / "out", "--workflow", str(other)) == 1
    assert f"sdedit.json and {other} have one name: rename" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_judges_that_are_not_there_stop_the_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("focusflow", tmp_path, "--dino", "nowhere.safetensors", count=1) == 1
    assert "nowhere.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", sorted({name for names in protocol.shipped.values() for name in names})
)
def test_shipped_methods_have_places_for_all_of_a_case(server: Server, name: str) -> None:
    assert running.Method.of(server, WORKFLOWS / f"{name}.json").name == name


def test_a_workflow_that_saves_several_pictures_is_refused(server: Server) -> None:
    with pytest.raises(ProtocolError, match="saves 2 pictures: give the edit's Save Image"):
        running.Method.of(server, WORKFLOWS / "flexip_gamma.json")


def test_a_row_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    store.add("edits", {"method": "a", "case": "1"})
    with (tmp_path / "edits.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"method": "a", "ca')
    assert list(store.rows("edits")) == [("a", "1")]
    store.add("edits", {"method": "a", "case": "2"})
    assert list(store.rows("edits")) == [("a", "1"), ("a", "2")]


class Parrot:
    """A client that finds a picture as near to a phrase as it is told."""

    def __init__(self, likeness: dict[str, float]):
        self.likeness = likeness

    def upload_image(self, name: str, _content: bytes) -> str:
        return name

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        shown = {}
        for key, node in graph.items():
            if node["class_type"] == "PreviewAny":
                (score, slot) = node["inputs"]["source"]
                assert slot == 4
                phrase = graph[score]["inputs"]["target_prompt"]
                shown[key] = {"text": [str(self.likeness[phrase])]}
        return shown


def test_a_clip_takes_the_nearest_phrase_of_each_attribute() -> None:
    attributes = {"hair": ["black hair", "red hair"], "mouth": ["a smile", "a straight face"]}
    client: Any = Parrot(
        {"black hair": 0.21, "red hair": 0.26, "a smile": 0.3, "a straight face": 0.2}
    )
    judges = Judges(clip="l.safetensors", clip_vision="l.safetensors")
    shown = judging.clip_words(client, judges, Image.new("RGB", (64, 48)), attributes)
    assert shown == {"hair": "red hair", "mouth": "a smile"}
    case = Case("ann", Path(), "", "", attribute="hair", value="red hair")
    before = {"hair": "black hair", "mouth": "a straight face"}
    assert judging.attribute_scores(case, before, shown) == {
        "attribute edited": 1.0,
        "attributes kept": 0.0,
    }
