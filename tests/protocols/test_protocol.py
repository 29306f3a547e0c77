"""Each protocol's command on a real server: run, interrupted, gone on with, and what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import protocol
from host.comfyui import PACK
from host.options import WORKFLOWS
from host.server import Server
from protocols import judging, running
from protocols.cases import ProtocolError
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
    assert calls[made:] == [1] * COUNT, "the edits that were made are only scored"
    assert figures(tmp_path / "parts") == expected
    page = (tmp_path / "parts" / "index.html").read_text("utf-8")
    assert page.count("alt=edit") == COUNT


@contextmanager
def listening_to_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background, as the tests may be, does not, nor do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_command_and_it_goes_on(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(PACK / "tests/bench/protocol.py"), "focusflow"]
    command += ["--server", server.address, "--count", "3", "--output", str(tmp_path)]
    command += ["--workflow", str(WORKFLOWS / "sdedit.json")]
    with listening_to_ctrl_c():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "1/3" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 130
    assert "Stopped; the same command goes on from here" in rest
    assert (tmp_path / "index.html").exists()
    before = Store(tmp_path).rows("edits")
    assert 1 <= len(before) < 3
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.count("\nedit ") + found.startswith("edit ") == 3 - len(before)
    assert "| whole psnr dB | sdedit | 3 |" in found


def test_a_bad_case_is_a_row_and_can_be_tried_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my run"
    data = protocol.drawn.focusflow(tmp_path / "data", 1, 4)
    picture = next((tmp_path / "data" / "images").glob("000*"))
    picture.write_bytes(b"no picture")
    assert run("focusflow", output, str(data), count=4) == 0
    assert "sdedit: 2 errors" in capsys.readouterr().out
    assert "cannot be opened" in (output / "index.html").read_text("utf-8")
    assert {figure["count"] for figure in figures(output)["all"]} == {2}
    assert run("focusflow", output, str(data), count=4) == 0
    assert "edit 1/4" not in capsys.readouterr().out, "errors stay until asked"
    assert run("focusflow", output, str(data), "--retry", count=4) == 0
    assert capsys.readouterr().out.count("cannot be opened") == 2
    assert f"--output '{output}'" in (output / "summary.md").read_text("utf-8")
    Image.new("RGB", (128, 128)).save(picture)
    assert run("focusflow", output, str(data), count=4) == 0
    assert figures(output)["errors"] == {"sdedit": 0}
    assert {figure["count"] for figure in figures(output)["all"]} == {4}


def test_drawn_data_of_another_run_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["protocol.py", "pie-bench", "--output", str(tmp_path), "--count"]
    found = []
    for count in "12":
        monkeypatch.setattr(sys, "argv", [*line, count])
        found.append(protocol.protocol_of(protocol.options()))
    assert [len(one.cases) for one in found] == [1, 2]
    folders = {one.cases[0].image.parents[2] for one in found}
    assert [
        len(json.loads((f / "mapping_file.json").read_text("utf-8"))) for f in sorted(folders)
    ] == [
        1,
        2,
    ]


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
    error = capsys.readouterr().err
    assert "--dino nowhere.safetensors is not in the server's models/clip_vision: there" in error
    assert "pinpoint_dino.safetensors" in error
    assert not (tmp_path / "edits.jsonl").exists()


@pytest.mark.parametrize(
    "name", sorted({name for names in protocol.shipped.values() for name in names})
)
def test_shipped_methods_have_places_for_all_of_a_case(server: Server, name: str) -> None:
    assert running.Method.of(server, WORKFLOWS / f"{name}.json").name == name


def test_a_workflow_that_saves_several_pictures_is_refused(server: Server) -> None:
    with pytest.raises(ProtocolError, match="saves 2 pictures: give the edit's Save Image"):
        running.Method.of(server, WORKFLOWS / "flexip_gamma.json")
