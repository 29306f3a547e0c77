"""What a second edit of the same picture costs when the source is remembered.

    python tests/bench/remembered.py --count 6 --seed 1 --json tests/bench/results/remembered.json

Each held-out portrait is edited twice from the same prompt, with FlowEdit's steps and guidance for
Flux.1 and the demo model in SD3's format. `latents` is how many latents the network is asked about
for one edit, `same` the share of second edits that are, to the last bit, those of a model that
remembers nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from bench import edits
from bench.lab import Lab, Row, arguments, report
from portraits.people import attributes, caption

columns = ["edit", "seconds", "times_faster", "latents", "same"]


def case_of(lab: Lab, case: edits.Case, changed: str) -> edits.Case:
    """The same picture, and a prompt that changes one attribute of it."""
    (edit,) = case.edits
    values = attributes[changed]
    other = values[(values.index(edit.source.attributes[changed]) + 1) % len(values)]
    target = lab.prompts([caption(edit.source.having(changed, other))])
    return replace(case, prompts={**case.prompts, "target": target})


def edited(lab: Lab, model: Any, case: edits.Case, *, finds: bool) -> Tensor:
    """The parts of an Edit with Words: a mask if it is to be found, and the edit."""
    mask = None
    if finds:
        mask, _ = edits.velocity_masks(lab, model, case, remember_source=True)
    return edits.sample_edit(
        lab,
        model,
        case.prompts,
        case.latent,
        case.seed,
        "FocusFlow",
        mask=mask,
        guidance=edits.published_guidance,
        remember_source=True,
    )


class Watch:
    """Seconds and latents of edits."""

    def __init__(self, network: nn.Module):
        self.seconds: dict[str, list[float]] = {}
        self.latents: dict[str, int] = {}
        self._asked = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, _network: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._asked += len(args[0])

    def timed(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """An edit, its cost kept under a name."""
        self._asked, started = 0, time.perf_counter()
        made = edited(*args, **kwargs)
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        self.latents[name] = self._asked
        return made


def main() -> None:
    """Edit, time, and report."""
    options = arguments(__doc__, 10)
    lab = Lab()
    watch, same = Watch(lab.model.model.diffusion_model), dict.fromkeys((True, False), 0)
    for case in edits.cases(lab, "held-out", options.seed, options.count, batch=1):
        first, second = (case_of(lab, case, changed) for changed in ("hat", "background"))
        for finds in (True, False):
            kind = "found mask" if finds else "no mask"
            model, other = lab.model.clone(), lab.model.clone()
            watch.timed(f"first, {kind}", lab, model, first, finds=finds)
            made = watch.timed(f"second, {kind}", lab, model, second, finds=finds)
            anew = watch.timed(f"second anew, {kind}", lab, other, second, finds=finds)
            same[finds] += torch.equal(made, anew)
    rows: list[Row] = []
    for name, seconds in watch.seconds.items():
        kind = name.split(", ")[1]
        median = statistics.median(seconds)
        whole = statistics.median(watch.seconds[f"first, {kind}"])
        row = {"edit": name, "seconds": median, "times_faster": whole / median}
        rows.append({**row, "latents": watch.latents[name]})
        if name.startswith("second, "):
            rows[-1]["same"] = same[kind == "found mask"] / options.count
    report(rows, columns, options.json, "Medians over the portraits, on a CPU.")


if __name__ == "__main__":
    main()
