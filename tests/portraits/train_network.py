"""Train a network of the proving ground.

    python tests/portraits/train_network.py sd3|flux|sd15 [--steps N] [--output FILE]

Resumes from `<output>.state.safetensors`. Of the codec, "sd3" and "flux" need the encoder only,
which is set by hand, so that it can be trained at the same time; "sd15" needs a trained one.
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
from portraits import weights
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


def training_set(made: Format, cache: Path) -> tuple[Tensor, Tensor]:
    """Latents (N, C, 16, 16) and tokens (N, 77); one caption in five leaves some phrases out."""
    if cache.exists():
        kept = load_file(cache)
        return kept["latents"], kept["tokens"]
    encode, tokens_of = made.latents(), tokenizer()
    rng, portraits = random.Random(0), people("train", 2, made.portraits)
    latents, tokens = [], []
    for start in range(0, made.portraits, 100):
        part = portraits[start : start + 100]
        latents.append(encode(pictures(part).float() / 255).half())
        for person in part:
            named = phrase_order
            if rng.random() < phrase_dropout:
                named = [name for name in phrase_order if rng.random() < 0.6]
            tokens.append(tokens_of(caption(person, named)))
        if start % 2000 == 0:
            print(f"drawing {start}/{made.portraits}", flush=True)
    kept = {"latents": torch.cat(latents), "tokens": torch.tensor(tokens)}
    save_file(kept, cache)
    return kept["latents"], kept["tokens"]


def train(made: Format, steps: int, output: Path) -> None:
    """Train with 10 % caption dropout."""
    import comfy.model_management

    # ComfyUI's fused kernels cannot be differentiated.
    comfy.model_management.in_training = True
    torch.manual_seed(0)
    latents, tokens = training_set(made, output.with_suffix(".data.safetensors"))
    empty = torch.tensor(tokenizer()(""))
    model = made.build()
    trainer = Trainer(model, steps, made.rate, output.with_suffix(".state.safetensors"), 500)
    for _ in trainer.run():
        picked = torch.randint(0, made.portraits, (made.batch,))
        x, words = latents[picked].float(), tokens[picked]
        words[torch.rand(made.batch) < caption_dropout] = empty
        noise, levels = torch.randn_like(x), made.process.levels(made.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=_bfloat16_is_fast()):
            noised = made.process.noised(x, noise, levels)
            found = made.predict(model, noised, levels, made.context(words))
        errors = F.mse_loss(found.float(), made.process.goal(x, noise), reduction="none")
        trainer.descend((errors.flatten(1).mean(1) * made.process.weight(levels)).mean())
    tensors = made.shipped({**model.state_dict(), **trainer.average})
    save_file({name: t.half().contiguous() for name, t in tensors.items()}, output)
    print(f"{output.stat().st_size} bytes")


def _bfloat16_is_fast() -> bool:
    """Without AMX, bf16 costs a CPU more than fp32."""
    return torch.cpu._is_amx_tile_supported()


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
    target = options.output or weights.network_files[options.format]
    train(FORMATS[options.format], options.steps, target)
