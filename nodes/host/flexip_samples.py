"""Validation pictures: what the adapter in training makes of one reference, at several gammas."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.sd import VAE
from torch import Tensor

from .flexip_settings import Pair, Text
from .flexip_training import Trainer

gammas = (0.3, 0.5, 0.7)
"""Those of the paper's figures: adapted to the prompt, between, preserved."""
steps, guidance = 20, 4.0


@torch.no_grad()
def pictures(trainer: Trainer, pair: Pair, vae: VAE) -> Tensor:
    """The pair's caption with its reference, from noise that is always the same.

    To be called while the training runs.

    Returns:
        (3, H, W, 3), one for each of `gammas`.
    """
    model, device = trainer.inner_model, trainer.model.load_device
    gamma = torch.tensor(gammas)
    blank = pair.without_subject().captioned(Text(*trainer.pairs.empty))

    def denoised(x: Tensor, sigma: Tensor, **_options: Any) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with_pair, without = (
            trainer.denoised(trainer.result, [one] * len(gammas), gamma, x, sigma)[0]
            for one in (pair, blank)
        )
        return without + guidance * (with_pair - without)

    sampling = model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps).to(device)
    generator = torch.Generator().manual_seed(trainer.settings.seed)
    noise = torch.randn(pair.latent.shape, generator=generator).expand(
        len(gammas), *pair.latent.shape
    )
    noise = noise.to(device)
    noised = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
    latent = sample_euler(denoised, noised, sigmas, disable=True)
    latent = model.process_latent_out(sampling.inverse_noise_scaling(sigmas[-1], latent).float())
    try:
        images = vae.decode(latent)
    finally:
        trainer.load_again()
    return images.reshape(-1, *images.shape[-3:]).cpu()
