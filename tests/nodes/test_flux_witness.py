"""An independent witness: diffusers' own Flux class, with the shipped transformer."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor

from host import diffusers_flux, stock
from host.edits import noises
from host.inprocess import Host
from host.inversions import Inversion, solver
from portraits import checkpoint, weights
from portraits.dataset import edits, pictures

# Of float32 on numbers of a few units, and that over the evaluations of an inversion.
VELOCITY_TOLERANCE = 1e-4
LATENT_TOLERANCE = 1e-3

SCHEDULE = (1.0, 0.85, 0.7, 0.5, 0.3, 0.15, 0.0)


@pytest.fixture(scope="module")
def transformer() -> Any:
    return diffusers_flux.load(weights.network_files["flux"])


@pytest.fixture(scope="module")
def model(host: Host) -> Any:  # noqa: ARG001
    return stock.call("UNETLoader", unet_name=checkpoint.flux_name, weight_dtype="default")[0]


@cache
def held_out() -> Any:
    """Two edits of portraits that no training saw."""
    return edits("flux witness", 0, 2)


@pytest.fixture(scope="module")
def latent(host: Host) -> Tensor:  # noqa: ARG001
    vae = stock.call("VAELoader", vae_name=checkpoint.vae_name)[0]
    drawn = pictures([edit.source for edit in held_out()]).float() / 255
    return stock.call("VAEEncode", vae=vae, pixels=drawn.movedim(1, -1))[0]["samples"]


@pytest.fixture(scope="module")
def prompts(host: Host) -> tuple[stock.Conditioning, stock.Conditioning]:  # noqa: ARG001
    """Of the first edit, source and target."""
    clip = stock.call("CLIPLoader", clip_name=checkpoint.clip_name, type="stable_diffusion")[0]
    source, target = (
        stock.call("CLIPTextEncode", clip=clip, text=text)[0] for text in held_out()[0].prompts
    )
    return source, target


@pytest.mark.parametrize("sigma", [1.0, 0.75, 0.3, 0.05])
def test_velocities_of_the_shipped_transformer(
    model: Any,
    transformer: Any,
    latent: Tensor,
    prompts: tuple[stock.Conditioning, ...],
    sigma: float,
) -> None:
    clean = model.model.process_latent_in(latent)
    x = (1 - sigma) * clean + sigma * next(noises(3, clean))
    for prompt in prompts:
        expected = diffusers_flux.velocity(transformer, x.clone(), sigma, prompt[0][0].clone())
        found = stock.velocity(model, prompt, None, 1.0, x, sigma)
        assert expected.std() > 0.5
        assert (found - expected).abs().max() <= VELOCITY_TOLERANCE


def test_rf_solver_with_diffusers_goes_the_same_way(
    model: Any, transformer: Any, latent: Tensor, prompts: tuple[stock.Conditioning, ...]
) -> None:
    """To noise with the source prompt and back with the target's, as RF-Solver-Edit's code."""
    job = Inversion(model, latent, SCHEDULE, "RF-Solver", source=prompts[0])

    def step(x: Tensor, text: Tensor, sigma: float, following: float) -> Tensor:
        h = following - sigma
        # Where there is no noise, velocities cannot be read from ComfyUI's x0.
        v = diffusers_flux.velocity(transformer, x, max(sigma, 1e-3), text)
        middle = diffusers_flux.velocity(transformer, x + h / 2 * v, sigma + h / 2, text)
        derivative = (middle - v) / (h / 2)
        return x + h * v + h**2 / 2 * derivative

    source, target = (prompt[0][0].clone() for prompt in prompts)
    x = model.model.process_latent_in(latent).clone()
    noise, _, trajectory, _ = job.run()
    for inverted, (sigma, following) in zip(
        trajectory.latents.flip(0)[1:], pairwise(SCHEDULE[::-1]), strict=True
    ):
        x = step(x, source, sigma, following)
        assert (inverted - x).abs().max() <= LATENT_TOLERANCE
    for sigma, following in pairwise(SCHEDULE):
        x = step(x, target, sigma, following)
    expected = model.model.process_latent_out(x)
    found = job.sampled(solver("RF-Solver"), noise, prompt=prompts[1])
    assert (expected - latent).abs().max() > 0.1
    assert (found - expected).abs().max() <= LATENT_TOLERANCE * 3
