"""Train a transformer of the proving ground as a rectified flow.

    python tests/portraits/train_transformer.py sd3|flux [--steps N] [--output FILE]

Resumes from `<output>.state.safetensors`. Needs the trained codec's encoder only, which is set by
hand, so that codec and transformers can be trained at the same time.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from host import inprocess
from portraits import codec, weights
from portraits.dataset import people, pictures
from portraits.formats import FORMATS, Format
from portraits.people import caption, phrase_order
from portraits.training import Trainer

caption_dropout = 0.1
phrase_dropout = 0.2


def tokenizer() -> Callable[[str], list[int]]:
    """CLIP's tokenizer as ComfyUI runs it: a text to 77 tokens."""
    from comfy.sd1_clip import SDTokenizer

    tokenize = SDTokenizer()
    return lambda text: [token for token, _ in tokenize.tokenize_with_weights(text)[0]]


def training_set(count: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Latents (N, 16, 16, 16) and tokens (N, 77); one caption in five leaves some phrases out."""
    if cache.exists():
        kept = load_file(cache)
        return kept["latents"], kept["tokens"]
    basis = codec.principal_components(pictures(people("train", 1, 512)).float() / 255)
    rng, portraits, tokens_of = random.Random(0), people("train", 2, count), tokenizer()
    latents, tokens = [], []
    for start in range(0, count, 100):
        part = portraits[start : start + 100]
        latents.append(codec.project(pictures(part).float() / 255, basis).half())
        for person in part:
            named = phrase_order
            if rng.random() < phrase_dropout:
                named = [name for name in phrase_order if rng.random() < 0.6]
            tokens.append(tokens_of(caption(person, named)))
        if start % 2000 == 0:
            print(f"drawing {start}/{count}", flush=True)
    made = {"latents": torch.cat(latents), "tokens": torch.tensor(tokens)}
    save_file(made, cache)
    return made["latents"], made["tokens"]


def train(made: Format, steps: int, output: Path, count: int = 24000, batch: int = 64) -> None:
    """Rectified flow with logit-normal sigma (shifted to noise) and 10 % caption dropout."""
    import comfy.model_management

    # ComfyUI's fused kernels cannot be differentiated.
    comfy.model_management.in_training = True
    torch.manual_seed(0)
    latents, tokens = training_set(count, output.with_name("portraits.data.safetensors"))
    empty = torch.tensor(tokenizer()(""))
    model = made.build()
    velocity = torch.compile(made.velocity)
    trainer = Trainer(model, steps, made.rate, output.with_suffix(".state.safetensors"), 500)
    for _ in trainer.run():
        picked = torch.randint(0, count, (batch,))
        x, words = latents[picked].float(), tokens[picked]
        words[torch.rand(batch) < caption_dropout] = empty
        noise, sigma = torch.randn_like(x), torch.sigmoid(torch.randn(batch) + 0.5)
        s = sigma.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            v = velocity(model, (1 - s) * x + s * noise, sigma, made.context(words))
        trainer.descend(F.mse_loss(v.float(), noise - x))
    tensors = made.shipped({**model.state_dict(), **trainer.average})
    save_file({name: t.half().contiguous() for name, t in tensors.items()}, output)
    print(f"{output.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    # The sub-quadratic attention that ComfyUI chooses on a CPU is slow to differentiate.
    inprocess.prepare(["--cpu", "--use-pytorch-cross-attention"])
    target = options.output or weights.transformer_files[options.format]
    train(FORMATS[options.format], options.steps, target)
