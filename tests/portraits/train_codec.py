"""Train a TAESD of the proving ground.

    python tests/portraits/train_codec.py 16|4 [--steps N] [--output FILE]

16 latent channels (SD3, Flux): the decoder alone. 4 (SD1.5): both halves, the decoder from that of
16 channels.

Resumes from `<output>.state.safetensors`. Writes fp16 weights that the stock VAELoader loads, and
prints the reconstruction error on held-out portraits.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from host import inprocess
from portraits import codec, weights
from portraits.dataset import people, pictures
from portraits.training import Trainer


@dataclass(frozen=True)
class Codec:
    """What differs between the codecs.

    Attributes:
        channels: of the latent.
        file: where the weights are shipped.
        scale, shift: of the latent format.
        steps, batch, rate: of the training.
        noise: deviation of what is added to latents.
        start: whose decoder to start from, and then train both halves; None for the decoder alone.
    """

    channels: int
    file: Path
    scale: float
    shift: float
    steps: int
    batch: int
    rate: float
    noise: float
    start: Path | None = None


_wide, _narrow = weights.codec_file, weights.sd15_codec_file
CODECS = {
    16: Codec(codec.channels, _wide, codec.sd3_scale, codec.sd3_shift, 3000, 16, 1.5e-3, 0.05),
    4: Codec(
        codec.sd15_channels,
        _narrow,
        codec.sd15_scale,
        codec.sd15_shift,
        steps=1400,
        batch=8,
        rate=1e-3,
        noise=0.1,
        start=_wide,
    ),
}


def train(made: Codec, steps: int, output: Path, pool_size: int = 6000, crop: int = 8) -> None:
    """Train on crops, with a little latent noise so that the decoder forgives small errors.

    Args:
        made: which codec.
        steps: optimiser steps.
        output: safetensors file to write.
        pool_size: training portraits.
        crop: side of a crop in latent cells.
    """
    import comfy.model_management

    comfy.model_management.in_training = True
    torch.manual_seed(0)
    pool = pictures(people("train", 1, pool_size))
    model = codec.build(made.channels)
    basis = codec.principal_components(pool[:512].float() / 255, made.channels)
    codec.set_encoder(model, basis)
    if made.start is not None:
        first = "taesd_decoder.1.weight"
        known = {k: t.float() for k, t in load_file(made.start).items() if "decoder" in k}
        model.load_state_dict({**known, first: model.state_dict()[first]}, strict=False)
    model.taesd_encoder.requires_grad_(made.start is not None)
    model.to(memory_format=torch.channels_last)
    trainer = Trainer(model, steps, made.rate, output.with_suffix(".state.safetensors"))
    for _ in trainer.run("PSNR"):
        picked = torch.randint(0, pool_size, (made.batch,))
        top, left = (8 * int(torch.randint(0, 16 - crop + 1, ())) for _ in range(2))
        x = pool[picked][:, :, top : top + 8 * crop, left : left + 8 * crop].float() / 255
        z = model.taesd_encoder(x.contiguous(memory_format=torch.channels_last))
        error = model.taesd_decoder(z + made.noise * torch.randn_like(z)) - x
        squared = error.pow(2).mean()
        trainer.descend(error.abs().mean() + 4 * squared, -10 * math.log10(squared.item()))
    save(made, model, trainer.average, output)


def save(made: Codec, model: nn.Module, average: dict[str, Tensor], output: Path) -> None:
    """Write fp16 weights in TAESD's keys and print how well they reconstruct."""
    shipped = {name: t.half().contiguous() for name, t in {**model.state_dict(), **average}.items()}
    shipped["vae_scale"] = torch.tensor(made.scale).half()
    shipped["vae_shift"] = torch.tensor(made.shift).half()
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
    parser.add_argument("channels", type=int, choices=CODECS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    inprocess.prepare(["--cpu"])
    chosen = CODECS[options.channels]
    train(chosen, options.steps or chosen.steps, options.output or chosen.file)
