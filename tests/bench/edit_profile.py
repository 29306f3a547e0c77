"""What an edit does outside of the network: time, host syncs, copies and allocations by place.

    python tests/bench/edit_profile.py --json tests/bench/results/edit_profile.json

One FocusFlow edit on a Flux.1-dev transformer of true width (3072) at 1024 x 1024 (4096 tokens of
the picture, 512 of the prompt) with random weights and one block of each kind; on a CPU, so all
that would wait for a GPU is counted, not timed. Rows are means of one step.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lab import Lab, Row, arguments, report
from bench.overhead import Stopwatch
from bench.random_models import random_flux, random_latent, random_prompt

width, blocks, side, words = 3072, (1, 1), 128, 512
true_blocks = 19 + 38
steps = 2
columns = ["edit", "where", "kind", "times", "megabytes"]

syncs = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item"}
copies = {"copy_", "_to_copy", "clone", "cat", "stack", "index_select", "index_copy", "repeat"}


class Watch(TorchDispatchMode):
    """Counts what happens outside of the network, by where in the pack or in ComfyUI it happens."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
        self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._note(func.__name__.split(".")[0], args, result)
        return result

    def around_network(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the diffusion model."""
        self._inside = True
        try:
            return executor(*args, **kwargs)
        finally:
            self._inside = False

    def around_sampler(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """A wrapper of the sampler."""
        with self:
            return executor(*args, **kwargs)

    def _note(self, name: str, args: tuple, result: Any) -> None:
        if name in syncs:
            kind, size = "sync", 0
        elif torch.is_tensor(result) and not _shares_memory(args, result):
            kind = "copy" if name in copies else "new tensor"
            size = result.nbytes
        elif name in copies and torch.is_tensor(result):
            kind, size = "copy", result.nbytes
        else:
            return
        entry = self.found[_where(), kind]
        entry[0] += 1
        entry[1] += size / 2**20


def _shares_memory(args: tuple, result: torch.Tensor) -> bool:
    """Whether a result is a view of an argument or was written into one."""
    storage = result.untyped_storage()._cdata
    return any(torch.is_tensor(a) and a.untyped_storage()._cdata == storage for a in args)


def _where() -> str:
    """The innermost function of the pack, or else of ComfyUI, that is running."""
    frame: Any = sys._getframe(3)
    host = None
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "custom_nodes" in file.parts:
            return f"{file.parent.name}/{file.name}: {frame.f_code.co_name}"
        if host is None and "comfy" in file.parts:
            host = f"comfy/{file.name}: {frame.f_code.co_name}"
        frame = frame.f_back
    return host or "elsewhere"


def run_edit(lab: Lab, model: Any, sampler: Callable, network: Callable, **widgets: Any) -> None:
    """An edit, with wrappers of the sampler and of the network."""
    from comfy.patcher_extension import WrappersMP

    # A key like the pack's own, which are no hindrance to remembering.
    key, model = "pinpoint_profile", model.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, key, sampler)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, network)
    mask = torch.zeros(1, side, side)
    mask[:, : side // 4, : side // 4] = 1
    parts = lab.edit_parts(
        model,
        {name: random_prompt(i, words, 768) for i, name in enumerate(("source", "target"))},
        1,
        steps=steps,
        n_max=steps,
        mask=mask,
        guidance=(1.5, 5.5),
        **widgets,
    )
    lab.run("SamplerCustomAdvanced", **parts, latent_image={"samples": random_latent(side)})


def profiled(lab: Lab, model: Any, name: str, **widgets: Any) -> list[Row]:
    """An edit's rows; it is timed and counted apart, as counting takes time."""
    whole, network, watch = Stopwatch(), Stopwatch(), Watch()
    run_edit(lab, model, whole, network, **widgets)
    run_edit(lab, model.clone(), watch.around_sampler, watch.around_network, **widgets)
    outside = (whole.seconds - network.seconds) / steps
    deep = network.seconds / steps * true_blocks / sum(blocks)
    totals = {
        "seconds outside": outside,
        f"percent outside, with {true_blocks} blocks": 100 * outside / (outside + deep),
    }
    rows = [{"edit": name, "where": "all", "kind": k, "times": n} for k, n in totals.items()]
    for (where, kind), (times, size) in sorted(watch.found.items(), key=lambda item: -item[1][1]):
        row: Row = {"edit": name, "where": where, "kind": kind, "times": times / steps}
        rows.append(row | {"megabytes": size / steps})
    return rows


def main() -> None:
    """Profile and report."""
    options = arguments(__doc__, 1)
    lab, model = Lab(), random_flux(width, *blocks)
    rows = profiled(lab, model, "one call", remember_source=False)
    rows += profiled(lab, model, "remembering", remember_source=True)
    report(rows, columns, options.json, notes)


notes = (
    "times and megabytes are of one step; what is done once (checks of mask and sigmas, all syncs "
    "among it) is spread over the steps of this short run. predict_together: ComfyUI stacks the "
    "conditionings of all prompts for one call, and weighs and sums up what comes back. "
    "exchange_rows: each prompt gets its own latent, in a copy. The others are sums and products "
    "of one latent (1 MB) or of both. remembering: each step's source latent is read back to be "
    "hashed, and its answer to be kept in main memory; on a GPU these two wait for it."
)


if __name__ == "__main__":
    main()
