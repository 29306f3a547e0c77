"""The script for long trainings: its options, its sentences, and runs of one and two processes."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open

from host import comfyui, flexips
from host.base import make_base
from host.inprocess import Host
from portraits import checkpoint, weights

SCRIPT = comfyui.PACK / "train_flexip.py"
QUICK = (
    *("--steps", "3", "--batch", "2", "--width", "64", "--resolution", "64"),
    *("--detail-depth", "1", "--global-depth", "1", "--text-depth", "1"),
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_flexip", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI base directory with the demo's models, and pictures in `data`."""
    base = make_base(tmp_path_factory.mktemp("script"))
    flexips.folder(base / "data")
    return base


def run(base: Path, output: str, *options: str, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
    """The script's exit code, and all that it said."""
    given = [
        *("--comfyui", str(comfyui.locate()), "--base-directory", str(base), "--cpu"),
        *("--checkpoint", checkpoint.name, "--data", str(base / "data"), "--output", output),
        *("--low", weights.low_encoder_file.name, "--high", weights.high_encoder_file.name),
    ]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *given, *QUICK, *options],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    return done.returncode, done.stdout


def losses(folder: Path) -> list[float]:
    with (folder / "losses.csv").open(encoding="utf-8", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_trains_and_goes_on(base: Path) -> None:
    code, said = run(base, "people/tiny", "--validate-every", "2")
    assert code == 0, said
    assert "tiny trained in" in said
    file = base / "models" / "flexip" / "people" / "tiny.safetensors"
    with safe_open(file, framework="pt") as adapter:
        about = adapter.metadata()
    assert about["family"] == "SD3"
    assert json.loads(about["recipe"])["steps"] == "3"
    log = base / "output" / "flexip" / "people" / "tiny"
    assert {path.name for path in log.iterdir()} == {
        *("losses.csv", "losses.png", "step_2.png", "step_3.png")
    }
    first = losses(log)
    assert len(first) == 3
    code, said = run(base, "people/tiny", "--steps", "4", "--validate-every", "0")
    assert code == 0, said
    assert "steps 3 to 4" in said
    assert losses(log)[:3] == first


def test_two_processes_train_one_adapter(base: Path) -> None:
    """As `accelerate launch` starts them on GPUs; on CPUs, only PyTorch's own launcher does."""
    pytest.importorskip("accelerate")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    cache = ("--cache", str(base / "two"), "--validate-every", "0")
    code, said = run(base, "two", *cache, launcher=launcher)
    assert code == 0, said
    assert said.count("two trained in") == 1
    # Six pictures, six captions and the empty one, each encoded by one of them.
    assert len(list((base / "two" / "1").glob("*/*.safetensors"))) == 13
    assert len(losses(base / "output" / "flexip" / "two")) == 3
    assert (base / "models" / "flexip" / "two.state.safetensors").exists()


def test_what_cannot_be_used_is_a_sentence(base: Path) -> None:
    code, said = run(base, "people/wrong", "--checkpoint", "none.safetensors")
    assert code == 1
    assert "none.safetensors" in said
    assert "name a file that ComfyUI's loaders list" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("named", [None, "empty"])
def test_without_comfyui(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    named: str | None,
) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.main([] if named is None else ["--comfyui", str(tmp_path / named)]) == 2
    assert "name the folder of ComfyUI, which has main.py" in capsys.readouterr().err


def test_comfyui_is_found_as_by_run_py(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str) -> Path:
        (tmp_path / name / "comfy").mkdir(parents=True)
        (tmp_path / name / "main.py").touch()
        return tmp_path / name

    named, meant, around = made("named"), made("meant"), made("around")
    monkeypatch.setattr(script, "ROOT", around / "custom_nodes" / "pinpoint")
    monkeypatch.setenv("COMFYUI_PATH", str(meant))
    assert script.comfyui_folder(named) == named
    assert script.comfyui_folder(None) == meant
    monkeypatch.delenv("COMFYUI_PATH")
    assert script.comfyui_folder(None) == around


def test_several_processes_need_accelerate(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert script.started_accelerator(cpu=True) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match="Several processes need accelerate, which is not inst"):
        script.started_accelerator(cpu=True)


def test_options_are_the_widgets(script: ModuleType, host: Host, pack: ModuleType) -> None:
    parts = ["--data", "d", "--output", "o", "--low", "l", "--high", "h"]
    options = script.parser(pack).parse_args(parts)
    node: Any = host.nodes["PinpointTrainFlexIP"]
    widgets = {i.id: i for i in node.define_schema().inputs if hasattr(i, "default")}
    assert set(script.given_otherwise) < widgets.keys()
    for name in widgets.keys() - set(script.given_otherwise):
        assert getattr(options, name) == widgets[name].default, name
    changed = script.parser(pack).parse_args([*parts, "--no-resume", "--mode", "linear"])
    assert (changed.resume, changed.mode) == (False, "linear")
    pack.nodes.adapter_training.plan_of({**vars(options), "model": stand_in()})


def stand_in() -> Any:
    """As much of a model as a plan looks at."""
    import torch

    return type("Model", (), {"load_device": torch.device("cpu")})


def test_a_model_has_to_be_named(script: ModuleType, host: Host, pack: ModuleType) -> None:  # noqa: ARG001
    options = script.parser(pack).parse_args(
        ["--data", "d", "--output", "o", "--low", "l", "--high", "h"]
    )
    with pytest.raises(ValueError, match="neither --checkpoint nor --unet is given"):
        script.loaded(options)


def test_an_encoder_that_is_not_there_is_told_by_its_option(
    script: ModuleType,
    host: Host,  # noqa: ARG001
    pack: ModuleType,
) -> None:
    options = argparse.Namespace(low="none.safetensors", low_activation="auto")
    with pytest.raises(ValueError, match=r"^--low: file_name is none\.safetensors, which is not"):
        script.image_encoder(pack, options, "low")
