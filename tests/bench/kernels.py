"""Which body of each kernel is the fastest, and how near is it to what memory allows?

    python tests/bench/kernels.py --json tests/bench/results/kernels.json

Needs a CUDA GPU and Triton. Every kernel with two bodies at Flux.1's sizes (4096 image tokens, 512
of text, 24 heads of 128, bfloat16; latents in float32, as ComfyUI samples them): torch as it is,
torch compiled, Triton. `ms` is the median of `--count` calls, each with an empty cache. `MB` is
what has to be read and written at least, and `% of copying` how long a copy of as much takes in
percent of `ms`: 100 cannot be beaten. `difference` is the largest to torch's result.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from bench.lab import Row, arguments, report
from host import base, inprocess

heads, width, text, image = 24, 128, 512, 4096
columns = ["kernel", "body", "ms", "of torch's", "MB", "% of copying", "difference"]


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def cases(kernels: str, device: str, seed: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """A call of every kernel with two bodies, and bytes that it reads and writes at least."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    # As a joint attention has them: tokens first, then heads.
    q, k, v = (randn(1, text + image, heads, width).transpose(1, 2) for _ in range(3))
    pixels, words, scale = q[:, :, text:], q[:, :, :8], width**-0.5
    phrases = torch.eye(text + image, device=device)[:, 5:7].clone()
    recorded, weight = randn(1, heads, image, width), randn(1, image).float().sigmoid()
    delta, *noisy = (randn(n, 16, 128, 128, dtype=torch.float32) for n in (1, 4, 4))
    mask = randn(1, 1, 128, 128, dtype=torch.float32).sigmoid()
    tokens, active = (randn(1, n, heads * width) for n in (text + image, image // 4))
    places = torch.randperm(image, generator=generator, device=device)[: image // 4]
    attention, flow, masks, taken = (
        importlib.import_module(f"{kernels}.{name}")
        for name in ("attention", "flow", "masks", "tokens")
    )

    def blend() -> Tensor:
        attention.blend_into(v[:, :, text:], recorded, weight)
        return v

    return {
        "attention_to": (
            lambda: attention.attention_to(pixels, k, phrases, scale),
            size(pixels, k, phrases) + 4 * image * phrases.shape[1],
        ),
        "attention_from": (
            lambda: attention.attention_from(words, k, scale),
            size(words, k) + 4 * words.shape[2] * k.shape[2],
        ),
        "blend_into": (blend, 3 * size(recorded) + size(weight)),
        "moved": (
            lambda: flow.moved(delta, [(*noisy, 4)], mask, -0.05, 4),
            size(*noisy, mask) + 3 * size(delta),
        ),
        "velocity_difference": (
            lambda: masks.velocity_difference(*noisy),
            size(*noisy) + 4 * size(mask),
        ),
        "gathered": (lambda: taken.gathered(tokens, places), size(places) + 2 * size(active)),
        "scattered": (
            lambda: taken.scattered(active, tokens, places),
            size(places) + 2 * size(tokens),
        ),
    }


def milliseconds(run: Callable[[], Any], count: int) -> float:
    """The median of some calls, each with an empty cache, after a few that warm up."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(count + 5):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def copying_speed(count: int) -> float:
    """Bytes that a copy reads and writes in a millisecond."""
    source = torch.empty(2**28, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size(source) / milliseconds(lambda: target.copy_(source), count)


def difference(found: Any, expected: Any) -> float:
    """The largest of any number of two results, which may be tuples."""
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def clone(found: Any) -> Any:
    """A result of its own: later calls may change what an earlier one returned."""
    return tuple(t.clone() for t in found) if isinstance(found, tuple) else found.clone()


def main() -> None:
    """Time every body of every kernel and report."""
    options = arguments(__doc__, 50)
    if not torch.cuda.is_available():
        sys.exit(
            "This bench times kernels on a GPU, and torch sees none: run it where there is one"
        )
    if find_spec("triton") is None:
        sys.exit("This bench needs Triton, which is not installed: pip install triton")
    host = inprocess.start(
        base.make_base(Path(tempfile.mkdtemp(prefix="pinpoint-bench-")), checkpoint=False)
    )
    speed = copying_speed(options.count)
    rows: dict[str, list[Row]] = {}
    results: dict[str, Any] = {}
    for body in ("torch", "torch compiled", "triton"):
        os.environ["PINPOINT_KERNELS"] = body.split()[0]
        # Made anew for each body, as one of the kernels changes what it is given.
        for name, (call, least) in cases(
            f"{host.pack.__name__}.kernels", "cuda", options.seed
        ).items():
            run = torch.compile(call) if "compiled" in body else call
            with torch.inference_mode():
                found = clone(run())
                time = milliseconds(run, options.count)
            expected = results.setdefault(name, found)
            row = {
                "kernel": name,
                "body": body,
                "ms": time,
                "of torch's": 1.0 if body == "torch" else time / rows[name][0]["ms"],
                "MB": least / 1e6,
                "% of copying": 100 * least / speed / time,
                "difference": difference(found, expected),
            }
            rows.setdefault(name, []).append(row)
            print(row, flush=True)
    report([row for kernel in rows.values() for row in kernel], columns, options.json)


if __name__ == "__main__":
    main()
