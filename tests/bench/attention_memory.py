"""How much memory does Attention Mask need: as much as the picture has tokens, or their square?

    python tests/bench/attention_memory.py --json tests/bench/results/attention_memory.json

One model call of a tiny Flux (true architecture, random weights) at 1k, 4k and 9k image tokens:
alone, with the node's reading of every block, and with a reading that holds each block's whole map
as a textbook does. Peak memory is the process's resident memory as Linux counts it, above that
before the call, so the bench runs on Linux only; each size is measured after a call that warms up.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable
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
columns = ["reading", "image tokens", "peak MB", "above the call alone", "seconds"]


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


def whole_map(q: Tensor, k: Tensor, columns: Tensor, scale: float, _mask: Tensor | None) -> Tensor:
    """`attention_to` of one block with every score in memory at once."""
    return ((q.float() * scale @ k.float().transpose(-1, -2)).softmax(-1) @ columns).mean(1)


def whole_spread(q: Tensor, k: Tensor, maps: Tensor, scale: float) -> Tensor:
    """`propagated` of one block with every score in memory at once."""
    return ((q.float() * scale @ k.float().transpose(-1, -2)).softmax(-1) @ maps[:, None]).mean(1)


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
    attending = sys.modules[f"{host.pack.__name__}.kernels.attention"]
    streamed = attending.attention_to, attending.propagated
    prompt = stock.conditioning(1, tokens=77)
    phrase = torch.eye(77)[:, 5:7]
    readings = {
        "model call alone": ("", streamed),
        "Attention Mask": ("all", streamed),
        "whole maps": ("all", (whole_map, whole_spread)),
    }
    rows: list[Row] = []
    for side in sides:
        latent = torch.randn(1, 16, 2 * side, 2 * side)
        alone = 0.0
        for name, (blocks, functions) in readings.items():
            attending.attention_to, attending.propagated = functions
            chosen = layouts.chosen_blocks(model, blocks) if blocks else frozenset()
            settings = located.GatherSettings(chosen, samples=1)

            def run(settings: Any = settings, latent: Tensor = latent) -> None:
                with torch.inference_mode():
                    if settings.blocks:
                        located.gathered(model, prompt, phrase, latent, settings)
                    else:
                        located.probe(model, prompt, latent, settings)

            run()
            peak, seconds = peak_above(run)
            alone = alone or peak
            rows.append(
                {
                    "reading": name,
                    "image tokens": side * side,
                    "peak MB": peak,
                    "above the call alone": peak - alone,
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
    attending.attention_to, attending.propagated = streamed
    report(rows, columns, options.json)


if __name__ == "__main__":
    main()
