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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from bench import edits
from bench.lab import Lab, Row, arguments, report
from portraits.dataset import people
from portraits.people import Portrait, attributes, caption

columns = ["edit", "seconds", "times_faster", "latents", "same"]


def prompts(lab: Lab, person: Portrait) -> dict[str, list]:
    """The source's prompt and two others'."""
    texts = {"source": caption(person)}
    for name, attribute in (("first", "hat"), ("second", "background")):
        values = attributes[attribute]
        other = values[(values.index(person.attributes[attribute]) + 1) % len(values)]
        texts[name] = caption(person.having(attribute, other))
    return {name: lab.prompts([text]) for name, text in texts.items()}


def edited(
    lab: Lab,
    model: Any,
    latent: dict[str, Tensor],
    said: dict[str, list],
    target: str,
    *,
    finds: bool,
) -> Tensor:
    """One Edit with Words of the node's parts: a mask if it is to be found, and the edit."""
    mask = None
    both = {"model": model, "source": said["source"], "target": said[target]}
    if finds:
        mask, *_ = lab.run(
            "PinpointVelocityMask",
            **both,
            latent=latent,
            noise_level=0.75,
            samples=10,
            guidance=1.0,
            threshold=0.3,
            softness=0.3,
            dilation=0,
            blur=0,
            seed=0,
        )
    (sampler,) = lab.run(
        "PinpointEditSampler",
        method="FocusFlow",
        n_max=edits.n_max,
        n_min=0,
        n_avg=1,
        reanchor=False,
        mask=mask,
    )
    source_guidance, target_guidance = edits.published_guidance
    (guider,) = lab.run(
        "PinpointSourceTargetGuider",
        **both,
        negative=lab.prompts([""]),
        source_guidance=source_guidance,
        target_guidance=target_guidance,
        guidance_mode="auto",
    )
    (sigmas,) = lab.run(
        "BasicScheduler", model=model, scheduler="simple", steps=edits.steps, denoise=1.0
    )
    (noise,) = lab.run("RandomNoise", noise_seed=0)
    made, _ = lab.run(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )
    return made["samples"]


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
    for person in people("held-out", options.seed, options.count):
        said, latent = prompts(lab, person), lab.encode(edits.pictures([person]).float() / 255)
        for finds in (True, False):
            kind = "found mask" if finds else "no mask"
            model, other = lab.model.clone(), lab.model.clone()
            given = {"latent": latent, "said": said, "finds": finds}
            watch.timed(f"first, {kind}", lab, model, target="first", **given)
            second = watch.timed(f"second, {kind}", lab, model, target="second", **given)
            anew = watch.timed(f"second anew, {kind}", lab, other, target="second", **given)
            same[finds] += torch.equal(second, anew)
    rows: list[Row] = []
    for name, seconds in watch.seconds.items():
        kind = name.split(", ")[1]
        median = statistics.median(seconds)
        first = statistics.median(watch.seconds[f"first, {kind}"])
        row = {"edit": name, "seconds": median, "times_faster": first / median}
        rows.append({**row, "latents": watch.latents[name]})
        if name.startswith("second, "):
            rows[-1]["same"] = same[kind == "found mask"] / options.count
    report(rows, columns, options.json, "Medians over the portraits, on a CPU.")


if __name__ == "__main__":
    main()
