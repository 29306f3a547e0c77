"""Train the SD3-format transformer of the proving ground as a rectified flow.

    python tests/portraits/train_transformer.py [--steps N] [--output FILE]

Resumes from `<output>.state.safetensors`. Needs the trained codec's encoder only, which is set by
hand, so that codec and transformer can be trained at the same time.
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
from torch import Tensor, nn

from host import inprocess
from portraits import codec, text_encoder, weights
from portraits.dataset import people, pictures
from portraits.people import caption, phrase_order
from portraits.training import Trainer

depth = 3
hidden = 64 * depth
context_width = 4096
caption_dropout = 0.1
phrase_dropout = 0.2


def build() -> nn.Module:
    """ComfyUI's SD3 transformer, 3 blocks of 192, for 768-wide text (padded to 4096 when saved)."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules import mmdit

    model = mmdit.OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=codec.channels,
        depth=depth,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": text_encoder.width, "out_features": hidden},
        },
        num_patches=64,
        pos_embed_max_size=8,
        qk_norm="rms",
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        device="cpu",
    )
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            nn.init.ones_(parameter)
        elif parameter.ndim < 2 or "adaLN" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
    grid = mmdit.get_2d_sincos_pos_embed_torch(hidden, 8, 8, device="cpu")
    model.pos_embed.copy_(grid.view(1, 64, hidden))
    return model


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


def train(steps: int, output: Path, count: int = 24000, batch: int = 64) -> None:
    """Rectified flow with logit-normal sigma (shifted to noise) and 10 % caption dropout."""
    torch.manual_seed(0)
    latents, tokens = training_set(count, output.with_suffix(".data.safetensors"))
    empty = torch.tensor(tokenizer()(""))
    token_table, position_table = (table.float() for table in text_encoder.embeddings())
    model = build()
    velocity = torch.compile(model)
    trainer = Trainer(model, steps, 1.2e-3, output.with_suffix(".state.safetensors"), 1000)
    for _ in trainer.run():
        picked = torch.randint(0, count, (batch,))
        x, words = latents[picked].float(), tokens[picked]
        words[torch.rand(batch) < caption_dropout] = empty
        context = token_table[words] + position_table
        noise, sigma = torch.randn_like(x), torch.sigmoid(torch.randn(batch) + 0.5)
        s = sigma.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            v = velocity((1 - s) * x + s * noise, sigma * 1000, context=context)
        trainer.descend(F.mse_loss(v.float(), noise - x))
    save(model, trainer.average, output)


def save(model: nn.Module, average: dict[str, Tensor], output: Path) -> None:
    """Write SD3 keys in fp16, the text projection padded to SD3's 4096-wide context."""
    tensors = {**model.state_dict(), **average}
    narrow = tensors["context_embedder.weight"]
    tensors["context_embedder.weight"] = F.pad(narrow, (0, context_width - narrow.shape[1]))
    save_file({name: t.half().contiguous() for name, t in tensors.items()}, output)
    print(f"{output.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--output", type=Path, default=weights.transformer_file)
    options = parser.parse_args()
    inprocess.prepare(["--cpu"])
    train(options.steps, options.output)
