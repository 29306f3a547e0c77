"""That Triton's compiler takes every kernel, which its interpreter does not show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from host.comfyui import PACK


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run(
        [sys.executable, "-I", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = {
        f"{file.stem}.{name}"
        for file in (PACK / "kernels" / "triton_bodies").glob("*.py")
        for name in re.findall(r"@triton.jit\ndef (\w+)\([^)]*\) -> None:", file.read_text())
    }
    assert {*done.stdout.split()} == written
