"""How much memory does Attention Mask need: as much as the picture has tokens, or their square?

    python tests/bench/attention_memory.py --json tests/bench/results/attention_memory.json

First one block's reading by itself, at Flux.1's 24 heads of 128, also spread once along the
picture's own attention (propagation 1); then one whole model call of a tiny Flux (true
architecture, random weights): alone, with the node's reading of every block, and with one that
holds each block's whole map as a textbook does. At 1k, 4k and 9k image tokens; the textbook's map
of 24 heads does not fit at 9k. Peak memory is the process's resident memory as Linux
counts it, above that before the call, so the bench runs on Linux only; a first call warms up.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import tiny
from bench.lab import Row, arguments, report
from host import base, inprocess, stock

sides = (32, 64, 96)
"""Image tokens along each side of the picture."""
heads, width, text = 24, 128, 512
columns = ["reading", "image tokens", "peak MB", "seconds"]


def peak_above(run: Callable[[], Any]) -> tuple[float, float]:
    """Megabytes that a call takes at most above what the process holds before it, and seconds."""
    gc.collect()
    # Memory that was freed but not given back would hide what is taken again.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _status("VmRSS"), time.perf_counter()
    run()
    return (_status("VmHWM") - before) / 1024, time.perf_counter() - started


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1])


def whole_map(
    q: Tensor, k: Tensor, columns: Tensor, scale: float, _mask: Tensor | None = None
) -> Tensor:
    """`attention_to` of one block with every score in memory at once."""
    columns = columns[:, None] if columns.ndim == 3 else columns
    return ((q.float() * scale @ k.float().transpose(-1, -2)).softmax(-1) @ columns).mean(1)


def one_block(attending: Any) -> list[Row]:
    """The reading of one block of Flux.1's size, streamed and with the whole map."""
    rows = []
    for side in sides:
        q = torch.randn(1, heads, side * side, width, dtype=torch.bfloat16)
        k = torch.randn(1, heads, side * side + text, width, dtype=torch.bfloat16)
        phrase = torch.eye(k.shape[2])[:, 5:7].clone()
        functions = {"": attending.attention_to, ", whole map": whole_map}
        if side == sides[-1]:
            del functions[", whole map"]
        for name, function in functions.items():
            for propagation, kind in enumerate(("one block", "one block, spread")):
                run = partial(reading, function, q, k, phrase, propagation)
                rows.append(measured(kind + name, side, run))
    return rows


def reading(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, phrase: Tensor, propagation: int
) -> Tensor:
    """A phrase's map from [text, picture] keys, spread along the picture's."""
    scale = width**-0.5
    maps = function(q, k, phrase, scale)
    for _ in range(propagation):
        maps = function(q, k[:, :, text:], maps, scale)
    return maps


def measured(name: str, side: int, run: Callable[[], Any]) -> Row:
    """A row for a call, which is made twice."""
    run()
    peak, seconds = peak_above(run)
    row: Row = {"reading": name, "image tokens": side * side, "peak MB": peak, "seconds": seconds}
    print(row, flush=True)
    return row


def main() -> None:
    """Measure every size and report."""
    options = arguments(__doc__, 1)
    host = inprocess.start(
        base.make_base(Path(tempfile.mkdtemp(prefix="pinpoint-bench-")), checkpoint=False)
    )
    file = tiny.ensure("flux", host.base / "models" / "diffusion_models")
    (model,) = stock.call("UNETLoader", unet_name=file, weight_dtype="default")
    nodes = f"{host.pack.__name__}.nodes.host."
    located, layouts = (sys.modules[nodes + name] for name in ("attention_map", "layouts"))
    attending: Any = sys.modules[f"{host.pack.__name__}.kernels.attention"]
    rows = one_block(attending)
    prompt = stock.conditioning(1, tokens=77)
    phrase = torch.eye(77)[:, 5:7]
    settings = located.GatherSettings(layouts.chosen_blocks(model, "all"), samples=1)
    streamed = attending.attention_to
    for side in sides:
        given = model, prompt, torch.randn(1, 16, 2 * side, 2 * side), settings
        gather = partial(located.gathered, *given[:2], phrase, *given[2:])
        with torch.inference_mode():
            rows.append(measured("model call alone", side, partial(located.probe, *given)))
            rows.append(measured("model call with Attention Mask", side, gather))
            attending.attention_to = whole_map
            rows.append(measured("model call with whole maps", side, gather))
            attending.attention_to = streamed
    report(rows, columns, options.json)


if __name__ == "__main__":
    main()
