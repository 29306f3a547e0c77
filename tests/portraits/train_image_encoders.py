"""Train an image encoder of the proving ground.

    python tests/portraits/train_image_encoders.py low|high [--steps N] [--output FILE]

Resumes from `<output>.state.safetensors`. Writes fp16 weights in the keys of Hugging Face, which
ComfyUI reads, and prints what linear probes find in the features of held-out portraits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from host import inprocess
from portraits import probes
from portraits.dataset import people, pictures
from portraits.image_encoders import (
    ENCODERS,
    build,
    grid,
    normalised,
    patch,
    resized,
    set_embeddings,
    width,
)
from portraits.people import Portrait
from portraits.probes import Labels
from portraits.training import Trainer

set_size, probe_size, judged_size = 24000, 2000, 500
"""Portraits to train on; those of them to fit the probes on; held-out ones to judge by."""
batch, rate = 32, 1e-3
steps_of = {"low": 7500, "high": 2250}
"""The shipped encoders did not come of one run of this: they made 7000 and 4500 steps with batches
of 16 from 10000 portraits and, for the low-level one, an identity weight of 5; the low-level one
then went on for 4000 steps as they are here, from which probes read far more of identities."""
identity_weights = {"low": 10.0, "high": 2.0}
"""Of the identity's error; that of the attributes has 1."""
head_weights = {"low": (0.3, 0.3, 1.0), "high": (1.0,)}
"""Of the errors of each of the heads' answers."""
pixel_weight = 0.5


class Heads(nn.Module):
    """What is thrown away after training: linear maps from features to the labels.

    The low-level encoder answers from its class token, from the mean of its patch tokens, and from
    all of them in their places; the high-level one from its image embedding. Each patch token of
    the low-level one also has to show its own pixels.
    """

    def __init__(self, name: str):
        super().__init__()
        widths = (width, width, grid * grid * width) if name == "low" else (width,)
        self.maps = nn.ModuleList(nn.Linear(size, probes.answers) for size in widths)
        self.pixels = nn.Linear(width, 3 * patch * patch) if name == "low" else None

    def forward(self, seen: tuple[Tensor, ...]) -> list[Tensor]:
        """One set of answers (B, 63) for each kind of feature."""
        return [answer(part) for answer, part in zip(self.maps, seen, strict=True)]

    def pixel_error(self, seen: tuple[Tensor, ...], images: Tensor) -> Tensor:
        """Mean squared error of the patches' own pixels; 0 for the high-level encoder."""
        if self.pixels is None:
            return images.new_zeros(())
        tokens = seen[-1].unflatten(1, (-1, width))
        own = F.unfold(images, patch, stride=patch).transpose(1, 2)
        return F.mse_loss(self.pixels(tokens), own)


def features(name: str, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """What the heads and the probes of an encoder read of normalised pictures."""
    last, _, embedding, _ = model(images, intermediate_output=None)
    if name == "high":
        return (embedding,)
    patches = last[:, 1:]
    return embedding, patches.mean(1), patches.flatten(1)


def training_set(cache: Path) -> tuple[Tensor, list[Portrait]]:
    """Pictures (N, 3, 112, 112) uint8 of the people to train on, and who they are."""
    portraits = people("train", 5, set_size)
    if not cache.exists():
        save_file({"pictures": resized(pictures(portraits))}, cache)
    return load_file(cache)["pictures"], portraits


def train(name: str, steps: int, output: Path) -> None:
    """Train one encoder together with its heads."""
    import comfy.model_management

    # ComfyUI's fused kernels cannot be differentiated.
    comfy.model_management.in_training = True
    torch.manual_seed(0)
    encoder = ENCODERS[name]
    pool, portraits = training_set(output.with_name(f"portraits_{set_size}.data.safetensors"))
    truth, model, heads = probes.labels(portraits), build(encoder), Heads(name)
    set_embeddings(encoder, model, normalised(encoder, pool[:500].float() / 255))
    both = nn.ModuleDict({"encoder": model, "heads": heads})
    trainer = Trainer(both, steps, rate, output.with_suffix(".state.safetensors"))
    for _ in trainer.run():
        picked = torch.randint(0, set_size, (batch,))
        images = normalised(encoder, pool[picked].float() / 255)
        seen = features(name, model, images)
        labels = truth.of(picked)
        errors = [
            weight * probes.error(answers, labels, identity_weights[name])
            for weight, answers in zip(head_weights[name], heads(seen), strict=True)
        ]
        trainer.descend(sum(errors) + pixel_weight * heads.pixel_error(seen, images))
    prefix = "encoder."
    trained = {n.removeprefix(prefix): t for n, t in trainer.average.items() if prefix in n}
    shipped = {n: t.half().contiguous() for n, t in {**model.state_dict(), **trained}.items()}
    save_file(shipped, output, {"format": "pt"})
    print(f"{output.stat().st_size} bytes")
    judge(name, output, pool, truth)


@torch.no_grad()
def judge(name: str, file: Path, pool: Tensor, truth: Labels) -> None:
    """Print what probes read from each kind of feature of held-out portraits."""
    encoder = ENCODERS[name]
    model = build(encoder)
    model.load_state_dict({n: t.float() for n, t in load_file(file).items()})
    held_out = people("held-out", 5, judged_size)
    images = torch.cat([pool[:probe_size], resized(pictures(held_out))]).float() / 255
    parts = [features(name, model, normalised(encoder, part)) for part in images.split(100)]
    known = Labels(truth.identity[:probe_size], truth.chosen[:probe_size])
    for kind, given in enumerate(zip(*parts, strict=True)):
        seen = torch.cat(given)
        found = probes.probed(seen[:probe_size], known, seen[probe_size:], probes.labels(held_out))
        for what, scores in (("R2", found.r2), ("accuracy", found.accuracy)):
            mean = sum(scores.values()) / len(scores)
            listed = ", ".join(f"{key} {score:.2f}" for key, score in scores.items())
            print(f"{name} feature {kind}: mean {what} {mean:.3f}: {listed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("encoder", choices=ENCODERS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    # The sub-quadratic attention that ComfyUI chooses on a CPU is slow to differentiate.
    inprocess.prepare(["--cpu", "--use-pytorch-cross-attention"])
    chosen: str = options.encoder
    train(chosen, options.steps or steps_of[chosen], options.output or ENCODERS[chosen].file)
