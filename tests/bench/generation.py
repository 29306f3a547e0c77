"""Do the demo model's portraits show what their captions say?

    python tests/bench/generation.py --count 200 --seed 1 --json tests/bench/results/generation.json
    python tests/bench/generation.py --count 200 --seed 1 --format flux \\
        --json tests/bench/results/generation_flux.json

Held-out captions, guidance 3, 28 Euler steps. The identity of each generated portrait is fitted by
gradient through the drawer, then each attribute is judged by re-drawing it with every value.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.lab import Lab, Row, arguments, report
from portraits.dataset import people, smallest_change
from portraits.drawing import draw
from portraits.judging import fitted_identities, nearest_values, psnr, visible
from portraits.people import Portrait, attributes, caption

guidance, steps, batch = 3.0, 28, 25


def generate(lab: Lab, portraits: list[Portrait], seed: int) -> torch.Tensor:
    """Portraits from their captions, with the stock KSampler."""
    channels = lab.model.get_model_object("latent_format").latent_channels
    latent = {"samples": torch.zeros(len(portraits), channels, 16, 16)}
    (made,) = lab.run(
        "KSampler",
        model=lab.model,
        seed=seed,
        steps=steps,
        cfg=guidance,
        sampler_name="euler",
        scheduler="simple",
        positive=lab.prompts([caption(p) for p in portraits]),
        negative=lab.prompts([""]),
        latent_image=latent,
    )
    return lab.decode(made)


def main() -> None:
    """Generate, fit, judge and report."""
    options = arguments(__doc__, 200, formats=True)
    lab = Lab(options.format)
    asked = people("held-out", options.seed, options.count)
    hits: dict[str, list[bool]] = {name: [] for name in attributes}
    fits = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        images = generate(lab, part, options.seed + start)
        fitted = fitted_identities(images, part)
        fits.append(psnr(images, draw(fitted)))
        for name, record in hits.items():
            seen = visible(fitted, name, smallest_change)
            values = nearest_values(images, fitted, name)
            record += [
                value == p.attributes[name]
                for value, p, shown in zip(values, part, seen, strict=True)
                if shown
            ]
        print(f"{start + len(part)}/{len(asked)}", flush=True)
    rows: list[Row] = [
        {"attribute": name, "accuracy": 100 * sum(r) / len(r), "judged": len(r)}
        for name, r in hits.items()
    ]
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    rows.append({"attribute": "mean", "accuracy": mean, "judged": len(asked)})
    rows.append(
        {"attribute": "fit of the re-drawing (dB)", "accuracy": float(torch.cat(fits).mean())}
    )
    report(rows, ["attribute", "accuracy", "judged"], options.json, "Accuracy in percent.")


if __name__ == "__main__":
    main()
