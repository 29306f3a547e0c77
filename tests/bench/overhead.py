"""What an edit costs beside its model calls: seconds, calls a step, and memory.

    python tests/bench/overhead.py --count 5 --json tests/bench/results/overhead.json

Runs FocusFlow on the demo model (64 image tokens) and on a random SD3 transformer at 1024 tokens.
`overhead_percent` is what the sampler takes over the bare calls, as many calls of ComfyUI's own
`calc_cond_batch` with the same four conditionings; `outside_network_percent` is its time outside
the network, most of it ComfyUI's batching; medians of `--count` runs. `held_mb` is the most memory
in tensors that are alive beside the model while it runs: the edit's latents, and the conditioning
that ComfyUI stacked for the call.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lab import Lab, Row, arguments, report
from bench.random_models import random_latent, random_prompt, random_sd3
from host import stock

steps = 6
columns = [
    "model",
    "tokens",
    "calls_per_step",
    "bare_seconds",
    "overhead_percent",
    "outside_network_percent",
    "held_mb",
]


class Stopwatch:
    """Times every call of a model."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """A wrapper in ComfyUI's sense."""
        started = time.perf_counter()
        result = executor(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        self.calls += 1
        return result


class Holdings(TorchDispatchMode):
    """Follows the tensors that are made, and notes how many bytes live when the model is called."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most, self.depth = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.depth == 0:
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if torch.is_tensor(tensor):
                    storage = tensor.untyped_storage()
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def at_call(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the model call: what it allocates itself is not the edit's."""
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        self.depth += 1
        try:
            return executor(*args, **kwargs)
        finally:
            self.depth -= 1


def edit_parts(lab: Lab, model: Any, side: int) -> dict[str, Any]:
    """FocusFlow with classifier-free guidance on both of two random prompts."""
    names = ("source", "target", "negative")
    mask = torch.zeros(1, side, side)
    mask[:, : side // 2] = 1
    return lab.edit_parts(
        model,
        {name: random_prompt(i) for i, name in enumerate(names)},
        1,
        steps=steps,
        n_max=steps,
        mask=mask,
        guidance=(1.5, 5.5),
    )


def bare_seconds(lab: Lab, model: Any, side: int) -> float:
    """Seconds of as many calls as an edit makes, by ComfyUI's own batching alone."""
    import comfy.samplers

    latent = random_latent(side)

    def call(guider: Any, extra_args: dict[str, Any]) -> float:
        conds = [*guider.conds.values(), *guider.source_conds.values()]
        sigma = torch.full((1,), 0.5)
        started = time.perf_counter()
        for _ in range(steps):
            comfy.samplers.calc_cond_batch(
                guider.inner_model, conds, latent, sigma, extra_args["model_options"]
            )
        return time.perf_counter() - started

    return stock.inside(edit_parts(lab, model, side)["guider"], latent, call)


def timed_edit(lab: Lab, model: Any, side: int) -> tuple[float, Stopwatch]:
    """Seconds of one FocusFlow sampling inside ComfyUI's sampling call, and its model calls."""
    watch, whole = Stopwatch(), Stopwatch()
    run_edit(lab, model, side, APPLY_MODEL=watch, SAMPLER_SAMPLE=whole)
    return whole.seconds, watch


def held_bytes(lab: Lab, model: Any, side: int) -> int:
    """The most that an edit holds in tensors while the model runs."""
    holdings = Holdings()

    def follow(executor: Callable, *args: Any, **kwargs: Any) -> Any:
        with holdings:
            return executor(*args, **kwargs)

    run_edit(lab, model, side, APPLY_MODEL=holdings.at_call, SAMPLER_SAMPLE=follow)
    return holdings.most


def run_edit(lab: Lab, model: Any, side: int, **wrappers: Callable) -> None:
    """FocusFlow on a random latent, with wrappers around ComfyUI's calls of that name."""
    from comfy.patcher_extension import WrappersMP

    timed = model.clone()
    for kind, wrapper in wrappers.items():
        timed.add_wrapper_with_key(getattr(WrappersMP, kind), "bench", wrapper)
    latent = {"samples": random_latent(side)}
    lab.run("SamplerCustomAdvanced", **edit_parts(lab, timed, side), latent_image=latent)


def main() -> None:
    """Time each size and report."""
    options = arguments(__doc__, 5)
    lab = Lab()
    sizes = [
        ("demo", lab.model, 16),
        ("SD3, 6 blocks of 384", random_sd3(6, 64), 64),
    ]
    rows: list[Row] = []
    for name, model, side in sizes:
        held = held_bytes(lab, model, side)
        # In turn, so that a machine that slows down slows both.
        runs = [
            (*timed_edit(lab, model, side), bare_seconds(lab, model, side))
            for _ in range(options.count)
        ]
        rows.append(
            {
                "model": name,
                "tokens": (side // 2) ** 2,
                "calls_per_step": runs[0][1].calls / steps,
                "bare_seconds": statistics.median(bare for _, _, bare in runs),
                "overhead_percent": 100 * statistics.median(e / bare - 1 for e, _, bare in runs),
                "outside_network_percent": 100
                * statistics.median(e / watch.seconds - 1 for e, watch, _ in runs),
                "held_mb": held / 2**20,
            }
        )
        print(rows[-1], flush=True)
    report(rows, columns, options.json)


if __name__ == "__main__":
    main()
