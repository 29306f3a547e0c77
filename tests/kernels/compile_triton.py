"""Compiles every Triton kernel for a GPU that need not be there, and prints their names.

A script of its own: where Triton is interpreted, as in the tests' process, it compiles nothing.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ampere = GPUTarget("cuda", 80, 32)
attention = {"heads": 24, "precision": "tf32", "block_q": 64, "block_k": 64, "block_w": 128}
KERNELS: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "_attend": {**attention, "steps": 72, "block_g": 16},
        "_sum_up": {**attention, "steps": 72},
        "_share_out": attention,
    },
    "blending": {"_blend": {"block_l": 32, "block_w": 128}},
    "flow": {"_move": {"draws": 2, "first": False, "last": True, "block": 1024}},
    "masks": {"_mean_difference": {"layers": 16, "block": 256}},
    "tokens": {
        "_gather": {"block_a": 16, "block_c": 256},
        "_scatter": {"block_a": 16, "block_c": 256},
    },
}
"""What is compiled in, kernel by kernel."""
POINTERS = {
    **dict.fromkeys(("levels", "totals", "sums", "columns"), "*fp32"),
    **dict.fromkeys(("index", "sources"), "*i64"),
    **dict.fromkeys(("q", "k", "values", "other", "weight", "delta", "mask"), "*bf16"),
    **dict.fromkeys(("target", "source", "result", "difference", "found"), "*bf16"),
    **dict.fromkeys(("tokens", "active", "kept"), "*bf16"),
}


def type_of(name: str) -> Any:
    """The type of an argument that is not compiled in."""
    if name.endswith("strides"):
        return ("i64", "i64", "i32", "i32")
    return POINTERS.get(name) or ("fp32" if name in ("scale", "step", "count") else "i32")


for module, kernels in KERNELS.items():
    bodies = importlib.import_module(f"kernels.triton_bodies.{module}")
    for name, constants in kernels.items():
        kernel = getattr(bodies, name)
        types = {n: type_of(n) for n in kernel.arg_names if n not in constants}
        source = ASTSource(
            kernel,
            signature={n: types.get(n, "constexpr") for n in kernel.arg_names},
            constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
        )
        assert triton.compile(source, target=ampere).asm["cubin"]
        print(f"{module}.{name}")
