"""Train the TAESD of the proving ground.

    python tests/portraits/train_codec.py [--steps N] [--output FILE]

Resumes from `<output>.state.safetensors`. Writes fp16 weights that the stock VAELoader loads, and
prints the reconstruction error on held-out portraits.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from host import inprocess
from portraits import codec, weights
from portraits.dataset import people, pictures
from portraits.training import Trainer


def train(steps: int, output: Path, pool_size: int = 6000, crop: int = 8, batch: int = 16) -> None:
    """Train the decoder on crops, with a little latent noise so that it forgives small errors.

    Args:
        steps: optimiser steps.
        output: safetensors file to write.
        pool_size: training portraits.
        crop: side of a crop in latent cells.
        batch: crops a step.
    """
    torch.manual_seed(0)
    pool = pictures(people("train", 1, pool_size))
    basis = codec.principal_components(pool[:512].float() / 255)
    latents = torch.cat(
        [codec.project(part.float() / 255, basis).half() for part in pool.split(100)]
    )
    model = codec.build()
    codec.set_encoder(model, basis)
    model.taesd_encoder.requires_grad_(False)
    model.taesd_decoder.to(memory_format=torch.channels_last)
    trainer = Trainer(model, steps, 1.5e-3, output.with_suffix(".state.safetensors"))
    for _ in trainer.run("PSNR"):
        picked = torch.randint(0, pool_size, (batch,))
        top, left = (int(torch.randint(0, 16 - crop + 1, ())) for _ in range(2))
        z = latents[picked][:, :, top : top + crop, left : left + crop].float()
        rows, columns = (slice(first * 8, (first + crop) * 8) for first in (top, left))
        x = pool[picked][:, :, rows, columns].float() / 255
        noisy = (z + 0.05 * torch.randn_like(z)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            y = model.taesd_decoder(noisy)
        error = y.float() - x
        squared = error.pow(2).mean()
        trainer.descend(error.abs().mean() + 4 * squared, -10 * math.log10(squared.item()))
    save(model, trainer.average, output)


def save(model: nn.Module, average: dict[str, Tensor], output: Path) -> None:
    """Write fp16 weights in TAESD's keys and print how well they reconstruct."""
    shipped = {name: t.half().contiguous() for name, t in {**model.state_dict(), **average}.items()}
    shipped["vae_scale"] = torch.tensor(codec.sd3_scale).half()
    shipped["vae_shift"] = torch.tensor(codec.sd3_shift).half()
    save_file(shipped, output)
    model.load_state_dict({name: t.float() for name, t in shipped.items()})
    x = pictures(people("held-out", 1, 64)).float() / 255
    with torch.no_grad():
        y = model.taesd_decoder(model.taesd_encoder(x)).clamp(0, 1)
    quality = -10 * math.log10(F.mse_loss(y, x).item())
    print(f"held-out PSNR {quality:.2f} dB, {output.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=weights.codec_file)
    options = parser.parse_args()
    inprocess.prepare(["--cpu"])
    train(options.steps, options.output)
