"""How well null-text inversion leads back, and Prompt-to-Prompt behind it, with SD1.5's demo model.

    python tests/bench/null_text.py --count 20 --seed 1 --json tests/bench/results/null_text.json

Reconstruction: the source prompt at a guidance of 7.5, by plain DDIM inversion and with optimised
embeddings, beside what the codec itself gives. Edits: the target prompt in the same way, without
and with Prompt-to-Prompt.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import Tensor

from bench.lab import Lab, Row, arguments, mean_row, report
from bench.portrait_scores import Panel
from portraits.dataset import Edit, edited_pixels, edits, pictures
from portraits.judging import outside, psnr

steps, guidance = 50, 7.5
columns = [
    "method",
    "psnr_reconstruction",
    "attribute_edited",
    "attributes_kept",
    "psnr_outside",
    "psnr_whole",
    "seconds",
]


class Inverted:
    """One edit's picture, run back to noise with embeddings of so many inner steps."""

    def __init__(self, lab: Lab, edit: Edit, inner_steps: int):
        self.lab, self.edit = lab, edit
        self.source = pictures([edit.source]).float() / 255
        self.target = pictures([edit.target]).float() / 255
        self.latent = lab.encode(self.source)
        (self.sigmas,) = lab.run(
            "BasicScheduler", model=lab.model, scheduler="normal", steps=steps, denoise=1.0
        )
        before, after = edit.prompts
        self.prompts = {"source": lab.prompts([before]), "target": lab.prompts([after])}
        started = time.perf_counter()
        self.noise, _, self.trajectory, _ = lab.run(
            "PinpointNullTextInversion",
            model=lab.model,
            source=self.prompts["source"],
            negative=lab.prompts([""]),
            latent=self.latent,
            sigmas=self.sigmas,
            guidance=guidance,
            inner_steps=inner_steps,
            learning_rate=0.01,
            early_stop=1.0,
        )
        self.seconds = time.perf_counter() - started

    def replayed(self, prompt: str) -> Tensor:
        """A prompt sampled with the trajectory's embeddings."""
        (guider,) = self.lab.run(
            "PinpointNullTextGuider",
            model=self.lab.model,
            trajectory=self.trajectory,
            positive=self.prompts[prompt],
            guidance=guidance,
        )
        return self._sampled(guider)

    def controlled(self, cross_until: float, self_until: float, *, blend: bool) -> Tensor:
        """The target prompt by Prompt-to-Prompt."""
        source, target = self.edit.prompts
        changed = set(source.split()) ^ set(target.split())
        model, *prompts = self.lab.run(
            "PinpointPromptToPrompt",
            model=self.lab.model,
            clip=self.lab.clip,
            source_prompt=source,
            target_prompt=target,
            mode="replace",
            cross_until=cross_until,
            self_until=self_until,
            self_grids="all",
            blocks="all",
            reweight="",
            blend_words=", ".join(sorted(word.strip(",") for word in changed)) if blend else "",
            blend_threshold=0.3,
            blend_start=0.2,
        )
        (guider,) = self.lab.run(
            "PinpointPromptToPromptGuider",
            model=model,
            source=prompts[0],
            target=prompts[1],
            source_guidance=guidance,
            target_guidance=guidance,
            guidance_mode="auto",
            trajectory=self.trajectory,
        )
        return self._sampled(guider)

    def _sampled(self, guider: Any) -> Tensor:
        (sampler,) = self.lab.run("KSamplerSelect", sampler_name="euler")
        return self.lab.sampled(self.noise, guider, sampler, self.sigmas, self.latent)


Method = Callable[[Inverted], Tensor]
methods: dict[str, Method] = {
    "target prompt": lambda found: found.replayed("target"),
    "Prompt-to-Prompt 0.4/0.6": lambda found: found.controlled(0.4, 0.6, blend=False),
    "Prompt-to-Prompt 0.8/0.4": lambda found: found.controlled(0.8, 0.4, blend=False),
    "Prompt-to-Prompt 0.8/0.4, local blend": lambda found: found.controlled(0.8, 0.4, blend=True),
}


def measured(lab: Lab, edit: Edit) -> dict[str, Row]:
    """All rows of one edit."""
    rows: dict[str, Row] = {}
    for name, inner_steps in {"DDIM inversion": 0, "null-text inversion": 10}.items():
        found = Inverted(lab, edit, inner_steps)
        back = found.replayed("source")
        rows[name] = {
            "psnr_reconstruction": float(psnr(back, found.source)),
            "seconds": found.seconds,
        }
    decoded = lab.decode(found.latent)
    rows["the codec alone"] = {"psnr_reconstruction": float(psnr(decoded, found.source))}
    panel, truth = Panel([edit]), edited_pixels(found.source, found.target)
    for name, method in methods.items():
        started = time.perf_counter()
        image = method(found)
        asked, kept = panel.verdicts(image)
        rows[name] = {
            "attribute_edited": 100 * float(asked),
            "attributes_kept": 100 * float(kept),
            "psnr_outside": float(psnr(image, decoded, outside(truth))),
            "psnr_whole": float(psnr(image, found.target)),
            "seconds": time.perf_counter() - started,
        }
    return rows


def main() -> None:
    """Run all rows on the same edits and report."""
    options = arguments(__doc__, 20)
    lab = Lab("sd15")
    rows: dict[str, list[Row]] = {}
    for edit in edits("held-out", options.seed, options.count):
        for name, row in measured(lab, edit).items():
            rows.setdefault(name, []).append(row)
            print(edit.attribute, name, row, flush=True)
    report([mean_row(name, found) for name, found in rows.items()], columns, options.json)


if __name__ == "__main__":
    main()
