"""An independent witness: diffusers loads the same IP-Adapter files into its own SD1.5 UNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import diffusers_unet, ip_adapters, stock
from host.edits import picture_latent

STEP, WEIGHT, GUIDANCE = 500, 0.7, 3.0
"""The step counts as diffusers counts training's."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Any]) -> Any:
    return tiny_model("sd15_whole")


def read_by(kind: str, subject: Any, seen: bool) -> Tensor:
    """What diffusers gives to a file's projection: (1, references, …)."""
    if kind == "global":
        return subject.high[None] * seen
    return subject.hidden[None] if seen else subject.blank.expand_as(subject.hidden)[None]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kinds", "gamma", "references"),
    [
        (("plus", "global"), 0.3, 1),
        (("plus", "global"), 0.0, 2),
        (("global", "plus"), 1.0, 1),
        (("full", "plus"), 0.6, 2),
    ],
)
def test_velocities_with_two_files(
    model: Any,
    pack: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kinds: tuple[str, str],
    gamma: float,
    references: int,
) -> None:
    folder = ip_adapters.folder(tmp_path, monkeypatch)
    files = [ip_adapters.weights(kind, seed=seed) for seed, kind in enumerate(kinds)]
    names = [ip_adapters.write(folder, *file) for file in zip("ab", files, strict=True)]
    adapter, _ = stock.call(
        "PinpointIPAdapterBranches", preservation=names[0], personalization=names[1]
    )
    subject = ip_adapters.subject(pack, references)
    settings = dict(mode="as trained", start=0.0, end=1.0, blocks="all")
    (patched,) = stock.call(
        "PinpointApplyFlexIP",
        **dict(model=model, adapter=adapter, subject=subject, gamma=gamma, weight=WEIGHT),
        **settings,
    )
    sampling = model.get_model_object("model_sampling")
    sigma = float(sampling.sigmas[STEP])
    x = picture_latent(1, 16, 8, channels=4) * sigma
    positive, negative = (stock.conditioning(seed, width=768) for seed in (1, 2))
    found = stock.velocity(patched, positive, negative, GUIDANCE, x, sigma)

    witness = diffusers_unet.sd15(model)
    gains = [WEIGHT * gamma, WEIGHT * (1 - gamma)]

    def predicted(text: Tensor, seen: bool) -> Tensor:
        return witness(
            x / (sigma**2 + 1) ** 0.5,
            STEP,
            text.clone(),
            added_cond_kwargs={"image_embeds": [read_by(k, subject, seen) for k in kinds]},
        ).sample

    diffusers_unet.with_ip_adapters(witness, files, gains)
    unconditional = predicted(negative[0][0], False)
    conditional = predicted(positive[0][0], True)
    expected = unconditional + GUIDANCE * (conditional - unconditional)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    plain = stock.velocity(model, positive, negative, GUIDANCE, x, sigma)
    assert (plain - expected).abs().mean() > 20 * (found - expected).abs().mean()
