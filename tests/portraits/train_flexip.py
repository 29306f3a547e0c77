"""Train the FlexIP adapter that ships with the demo, on portraits: taught, then trained.

    python tests/portraits/train_flexip.py [--gate literal|linear|none] [--steps N]
        [--output FILE] [--data FILE]

A variant pair is the same identity at another place with other attributes; an invariant pair is one
portrait twice, or the same identity at the same place with other attributes. Captions of portraits
that are their own references leave out phrases more often than not: what a caption does not say has
to come from the reference. The ranges of gamma overlap: where only equal pictures are shown at high
gammas, parts of the reference come where the prompt asks for others. An interrupted run goes on
from its state file.

First the tokens are taught who is in a reference, by the labels that the drawer knows. That takes
minutes where the model's own error would take hours to bring it about: at this scale most of that
error is where a face is in the picture and what its noise was, and little is whose face it is. Then
the pack's own trainer trains all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.lab import Lab
from portraits import image_encoders, probes, weights
from portraits.dataset import people, pictures, views
from portraits.formats import FORMATS
from portraits.people import Portrait, caption, phrase_order
from portraits.text_encoder import width as text_width
from portraits.training import Trainer

identities, pictures_each = 6000, 4
teaching_steps, teaching_batch, teaching_rate = 2000, 32, 1.5e-3
sizes = {"width": 128, "detail_depth": 2, "global_depth": 1, "text_depth": 2}
identity_weight = 4.0
"""Of the identity's error in teaching; that of the attributes has 1."""


told = ("steps", "batch", "rate", "levels", "gamma_invariant", "gamma_variant")
"""Of the settings, what the file tells."""


class Kind(NamedTuple):
    """Of pairs.

    Attributes:
        share: of all pairs.
        partial: share of its captions that leave out phrases.
        invariant: whether gamma is drawn from the range of invariant pairs.
        flips: what the reference's number may differ by from the target's, bit by bit.
    """

    share: float
    partial: float
    invariant: bool
    flips: tuple[int, ...]


kinds = (
    Kind(0.45, 0.6, True, (0,)),
    # At the same place with other attributes, and at another place.
    Kind(0.15, 0.1, True, (1,)),
    Kind(0.40, 0.1, False, (2, 3)),
)


def in_twos(portraits: list[Portrait]) -> list[Portrait]:
    """One person's portraits, of which the first two are at one place, the next two, and so on."""
    return [
        replace(portrait, identity=portraits[number - number % 2].identity)
        for number, portrait in enumerate(portraits)
    ]


def caption_of(person: Portrait, partial: float, rng: random.Random) -> str:
    """Its caption, which may leave out phrases."""
    if rng.random() >= partial:
        return caption(person)
    return caption(person, [name for name in phrase_order if rng.random() < 0.5])


class PortraitPairs:
    """Pairs of drawn portraits, as `flexip_training.Pairs`.

    Args:
        make: `flexip_training.Pair`.
    """

    def __init__(self, lab: Lab, make: Any, cache: Path):
        rng = random.Random(0)
        self.portraits = [
            portrait
            for person in people("train", 5, identities)
            for portrait in in_twos(views(person, rng, pictures_each))
        ]
        self.lab, self.make = lab, make
        if not cache.exists():
            part = cache.with_suffix(f".{os.getpid()}.part")
            save_file(_features(lab, self.portraits), part, {"made_of": _made_of()})
            part.replace(cache)
        with safe_open(cache, framework="pt") as file:
            if file.metadata() != {"made_of": _made_of()}:
                raise ValueError(f"{cache} is of other people or encoders: delete it")
        self.features = load_file(cache)
        self.empty = self._text("")

    def drawn(self, chance: random.Random) -> Any:
        """A pair."""
        kind = chance.choices(kinds, [kind.share for kind in kinds])[0]
        person = chance.randrange(identities) * pictures_each
        number = chance.randrange(pictures_each)
        target, reference = person + number, person + (number ^ chance.choice(kind.flips))
        text, pooled = self._text(caption_of(self.portraits[target], kind.partial, chance))
        low, high = (self.features[name][reference] for name in ("low", "high"))
        latent = self.features["latents"][target]
        return self.make(low, high, latent, text, pooled, kind.invariant)

    def _text(self, text: str) -> tuple[Tensor, Tensor]:
        # What `Lab.prompts` gives, for one prompt of which nothing is compared.
        tokens = torch.tensor([self.lab.tokens(text)])
        context = FORMATS["sd3"].context(tokens)
        return F.pad(context, (0, 4096 - text_width))[0], torch.zeros(2048)


def _made_of() -> str:
    """What the drawn pairs depend on."""
    files = (image_encoders.ENCODERS[name].file for name in ("low", "high"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    return f"{identities} people, {pictures_each} pictures each, encoders {' '.join(digests)}"


def teach(network: Any, pairs: PortraitPairs, state: Path) -> None:
    """Teach an adapter's preservation tokens who is in a reference and what the caption would say.

    Linear maps read the labels from each token and from all together; they are thrown away.
    """
    count = network.sizes.detail_tokens + network.sizes.global_tokens
    each, whole = (nn.Linear(n * sizes["width"], probes.answers) for n in (1, count))
    parts = (network.low, network.high, network.detail, network.overall, each, whole)
    learned = nn.ModuleList(parts)
    learned.register_parameter("queries", network.queries)
    truth = probes.labels(pairs.portraits)
    trainer = Trainer(learned, teaching_steps, teaching_rate, state)
    for _ in trainer.run():
        picked = torch.randint(len(pairs.portraits), (teaching_batch,))
        low, high = (pairs.features[name][picked].float() for name in ("low", "high"))
        tokens, labels = network.preservation(low, high), truth.of(picked)
        loss = probes.error(whole(tokens.flatten(1)), labels, identity_weight)
        answers = each(tokens).flatten(0, 1)
        trainer.descend(loss + probes.error(answers, labels.repeated(count), identity_weight))


def _features(lab: Lab, portraits: list[Portrait]) -> dict[str, Tensor]:
    low, high = (_encoder(name) for name in ("low", "high"))
    # What the demo's VAE gives, in a fraction of its time.
    project, latent_of = FORMATS["sd3"].latents(), lab.model.model.process_latent_out
    found: dict[str, list[Tensor]] = {"low": [], "high": [], "latents": []}
    for start in range(0, len(portraits), 100):
        images = pictures(portraits[start : start + 100]).float() / 255
        with torch.inference_mode():
            pixels = images.movedim(1, -1)
            found["low"].append(low.encode_image(pixels)["last_hidden_state"][:, 1:].half())
            found["high"].append(high.encode_image(pixels)["image_embeds"].half())
            found["latents"].append(latent_of(project(images)).half())
        if start % 2000 == 0:
            print(f"drawing {start}/{len(portraits)}", flush=True)
    return {name: torch.cat(parts).clone() for name, parts in found.items()}


def _encoder(name: str) -> Any:
    """A shipped image encoder as ComfyUI's."""
    from comfy.clip_vision import ClipVisionModel

    encoder = image_encoders.ENCODERS[name]
    made = ClipVisionModel(encoder.config)
    missing, _ = made.load_sd(load_file(encoder.file))
    if missing:
        raise ValueError(f"{encoder.file} has no {missing}")
    return made


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument(
        "--gate",
        choices=("literal", "linear", "none"),
        default="literal",
        help="none: all as preservation, as in an IP-Adapter",
    )
    parser.add_argument("--output", type=Path, default=weights.flexip_file)
    parser.add_argument("--data", type=Path, help="the drawn pairs, made if they are not there")
    options = parser.parse_args()
    # The sub-quadratic attention that ComfyUI chooses on a CPU is slow to differentiate.
    lab = Lab("sd3", ["--use-pytorch-cross-attention"])
    host = f"{lab.host.pack.__name__}.nodes.host"
    training, files, layouts, subjects = (
        importlib.import_module(f"{host}.{name}")
        for name in ("flexip_training", "adapter_files", "layouts", "subjects")
    )
    torch.manual_seed(0)
    data = options.data or options.output.with_suffix(".data.safetensors")
    pairs = PortraitPairs(lab, training.Pair, data)
    low, high = (pairs.features[name].shape[-1] for name in ("low", "high"))
    network = training.new_network(lab.model, low, high, 4096, **sizes)
    state = options.output.with_suffix(".state.safetensors")
    if not state.exists():
        teach(network, pairs, options.output.with_suffix(".taught.safetensors"))
    is_gated = options.gate != "none"
    settings = training.TrainingSettings(
        options.steps,
        batch=16,
        rate=1e-3,
        weight_decay=0.0,
        warm_up=50,
        # Where there is less noise, the noisy picture shows the face better than a reference.
        levels=(0.25, 1.0),
        # With gamma 1 in linear mode, there is no personalization.
        gamma_invariant=(0.4, 1.0) if is_gated else (1.0, 1.0),
        gamma_variant=(0.0, 0.6) if is_gated else (1.0, 1.0),
        mode="literal" if options.gate == "literal" else "linear",
    )

    def watch(trainer: Any) -> None:
        if trainer.progress.step % 100 == 0:
            recent = trainer.progress.losses[-100:]
            print(f"step {trainer.progress.step}  loss {sum(recent) / len(recent):.4f}", flush=True)

    trainer = training.Trainer(lab.model, network, pairs, settings, state, watch=watch)
    trainer.run()
    blocks = layouts.blocks_of(lab.model)
    recipe = {
        "trained_on": f"procedural portraits, {_made_of()}",
        "taught": f"{teaching_steps} steps on labels",
        "pairs": "; ".join(map(str, kinds)),
        **{name: str(getattr(settings, name)) for name in told},
    }
    encoders = tuple(subjects.kind_of(_encoder(name)) for name in ("low", "high"))
    content = files.content(trainer.result, blocks, "SD3", settings.mode, recipe, encoders)
    save_file(content[0], options.output, content[1])
    print(f"{options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
