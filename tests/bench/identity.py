"""Does a learned identity stay while the words change? S2Edit against its baselines and ablations.

    python tests/bench/identity.py --count 40 --seed 1 \\
        --cache tests/bench/results/identity_people.json --json tests/bench/results/identity.json

Each held-out person is learned from one picture by every row that learns, then edited five times
with the same editor, noises and weights. A finished row of a person is kept in `--cache`, from
which an interrupted run goes on: 40 people take two cores of a CPU about four hours.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from torch import Tensor

from bench import edits
from bench.lab import Kept, Lab, Row, mean_row, parser, report, shallow_clip
from bench.portrait_scores import Panel, identity_kept
from portraits.dataset import Edit, edited_pixels, people, pictures, smallest_change
from portraits.drawing import draw
from portraits.judging import drawn_values, outside, psnr
from portraits.people import Portrait, attributes, caption

name, class_word = "ann", "person"
guidance = 2.0
edited_attributes = ("hair", "eyewear", "expression", "lips", "hat", "skin", "beard", "eyes")
"""In the order in which they are taken; five of them that can be seen."""
edits_each, backgrounds_each = 5, 2
columns = [
    "method",
    "identity_kept",
    "attribute_edited",
    "attributes_kept",
    "psnr_outside",
    "psnr_whole",
    "identity_recreated",
    "recreated_edited",
    "psnr_recreated",
    "background_free",
    "psnr_background",
    "cosine",
    "learning_seconds",
    "editing_seconds",
    "peak_mb",
]


@dataclass(frozen=True)
class Recipe:
    """How a row learns: what differs from Learn Identity's defaults, and whether it gets a mask."""

    widgets: dict[str, Any] = field(default_factory=dict)
    masked: bool = True


alone = {"orthogonality": 0.0, "preservation": 0.0, "confine_word": False}
"""Nothing of what S2Edit adds."""


def recipes(total: int) -> dict[str, Recipe | None]:
    """Row -> how it learns; None learns nothing. The baselines get as many steps in all."""
    return {
        "no identity": None,
        # A word that has to hold all moves farther.
        "textual inversion": Recipe(
            {**alone, "token_steps": total, "steps": 0, "token_rate": 0.1, "update_every": 5},
            masked=False,
        ),
        "DreamBooth-LoRA": Recipe(
            # A rare word that stays as it is.
            {**alone, "token_steps": 0, "steps": total, "token_rate": 0.0, "start_word": "sks"},
            masked=False,
        ),
        "S2Edit": Recipe(),
        # At 0 the attribute words would not be read, and the cosine not be known.
        "no orthogonality": Recipe({"orthogonality": 1e-9}),
        "no preservation": Recipe({"preservation": 0.0}),
        "no masked attention": Recipe({"confine_word": False}, masked=False),
    }


@dataclass(frozen=True)
class Sitter:
    """A person, five edits, two other backgrounds, and all of it as pictures and as a latent."""

    number: int
    person: Portrait
    edits: list[Edit]
    backgrounds: list[Edit]
    source: Tensor
    target: Tensor
    mask: Tensor
    latent: dict[str, Tensor]
    decoded: Tensor


def sitters(lab: Lab, split: str, seed: int, count: int) -> Iterator[Sitter]:
    """People of a split with their edits, of which each can be seen."""
    rng = random.Random(f"{split}:identity:{seed}")
    for number, person in enumerate(people(split, seed, count)):
        chosen = list(_edits(person, rng))[:edits_each]
        source = pictures([person]).float() / 255
        target = pictures([edit.target for edit in chosen]).float() / 255
        # The person is what is left when the background changes.
        _, background = drawn_values([person], "background")
        latent = lab.encode(source)
        yield Sitter(
            number,
            person,
            chosen,
            _backgrounds(person, rng),
            source,
            target,
            1 - background,
            latent,
            lab.decode(latent),
        )


def _edits(person: Portrait, rng: random.Random) -> Iterator[Edit]:
    for attribute in edited_attributes:
        values = [v for v in attributes[attribute] if v != person.attributes[attribute]]
        edit = Edit(person, person.having(attribute, rng.choice(values)), attribute)
        seen = edited_pixels(draw([edit.source]), draw([edit.target])).sum() >= smallest_change
        if seen and edit.prompts[0] != edit.prompts[1]:
            yield edit


def _backgrounds(person: Portrait, rng: random.Random) -> list[Edit]:
    shown = person.attributes["background"]
    others = [value for value in attributes["background"] if value != shown]
    chosen = rng.sample(others, backgrounds_each)
    return [Edit(person, person.having("background", v), "background") for v in chosen]


def prompts(edit: Edit, knows: bool) -> tuple[str, str]:
    """Source and target caption, with the learned word in place of the class word if there is one.

    The demo models know captions of a fixed number of words: one more moves all that follow, and
    they edit nothing then, with or without an identity.
    """
    source, target = edit.prompts
    return (named(source), named(target)) if knows else (source, target)


def named(text: str) -> str:
    """A caption with the learned word in place of the class word."""
    return text.replace(class_word, f"<{name}>")


@contextmanager
def peak_memory(every: float = 0.02) -> Iterator[list[float]]:
    """How much this process grows at most, in MB: a list of one number once it is closed."""
    process, done, seen = psutil.Process(), threading.Event(), []
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(every):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    grown: list[float] = []
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()
        grown.append((max(seen, default=before) - before) / 2**20)


def learn(lab: Lab, picture: Tensor, mask: Tensor | None, widgets: dict[str, Any]) -> tuple:
    """An identity from a picture (1, 3, H, W), and what learning it cost."""
    given = {
        **lab.defaults("PinpointLearnIdentity"),
        "model": lab.model,
        "clip": lab.clip,
        "vae": lab.vae,
        "image": picture.movedim(1, -1),
        "preview_every": 0,
        **widgets,
    }
    if mask is not None:
        given["mask"] = mask
    started = time.perf_counter()
    with peak_memory() as grown:
        identity, *_, text = lab.run(
            "PinpointLearnIdentity", **{key: [value] for key, value in given.items()}
        )
    cost: Row = {"learning_seconds": time.perf_counter() - started, "peak_mb": grown[0]}
    found = [line for line in text.splitlines() if "|cos|" in line]
    if found:
        cost["cosine"] = float(found[0].split()[-1])
    return identity, cost


def learned(lab: Lab, sitter: Sitter, recipe: Recipe) -> tuple[Any, Any, Row]:
    """Model and text encoder that know the person, and what learning cost."""
    mask = sitter.mask if recipe.masked else None
    widgets = {
        "prompt": named(caption(sitter.person)),
        "name": name,
        "class_word": class_word,
        "seed": sitter.number,
        **recipe.widgets,
    }
    identity, cost = learn(lab, sitter.source, mask, widgets)
    return *applied(lab, lab.model, lab.clip, identity, mask), cost


def applied(lab: Lab, model: Any, clip: Any, identity: Any, mask: Tensor | None) -> tuple[Any, Any]:
    """Model and text encoder that know one identity more."""
    return lab.run(
        "PinpointApplyIdentity",
        model=model,
        clip=clip,
        identity=identity,
        strength=1.0,
        name="",
        mask=mask,
    )


def edited(lab: Lab, model: Any, clip: Any, sitter: Sitter, pairs: list[tuple[str, str]]) -> Tensor:
    """Edits of a person, each from a source to a target prompt, in one batch by FlowEdit."""
    encoded = {
        "source": _encoded(lab, clip, [source for source, _ in pairs]),
        "target": _encoded(lab, clip, [target for _, target in pairs]),
        "negative": _encoded(lab, clip, [""]),
    }
    latent = {"samples": sitter.latent["samples"].repeat(len(pairs), 1, 1, 1)}
    return edits.sample_edit(
        lab, model, encoded, latent, sitter.number, "FlowEdit", mask=None, guidance=(1.0, guidance)
    )


def recreated(lab: Lab, model: Any, clip: Any, sitter: Sitter, texts: list[str]) -> Tensor:
    """The person from noise, by each text."""
    (guider,) = lab.run(
        "CFGGuider",
        model=model,
        positive=_encoded(lab, clip, texts),
        negative=_encoded(lab, clip, [""]),
        cfg=guidance,
    )
    (sampler,) = lab.run("KSamplerSelect", sampler_name="euler")
    latent = {"samples": torch.zeros(len(texts), *sitter.latent["samples"].shape[1:])}
    (sigmas,) = lab.run(
        "BasicScheduler", model=model, scheduler="simple", steps=edits.steps, denoise=1.0
    )
    (noise,) = lab.run("RandomNoise", noise_seed=sitter.number)
    return lab.sampled(noise, guider, sampler, sigmas, latent)


def _encoded(lab: Lab, clip: Any, texts: list[str]) -> list:
    """One CONDITIONING whose rows are the prompts; the learned word is in the same place in all."""
    found = {text: lab.run("CLIPTextEncode", clip=clip, text=text)[0][0] for text in set(texts)}
    _, entries = found[texts[0]]
    pooled = torch.cat([found[text][1]["pooled_output"] for text in texts])
    return [[torch.cat([found[t][0] for t in texts]), {**entries, "pooled_output": pooled}]]


def scores(panel: Panel, sitter: Sitter, images: Tensor) -> dict[str, Tensor]:
    """Figures of each of a person's edits."""
    asked, kept = panel.verdicts(images)
    source = sitter.source.expand_as(sitter.target)
    truth = edited_pixels(source, sitter.target)
    decoded = sitter.decoded.expand_as(sitter.target)
    return {
        "identity_kept": 100 * identity_kept(sitter.edits, images),
        "attribute_edited": 100 * asked,
        "attributes_kept": 100 * kept,
        "psnr_outside": psnr(images, decoded, outside(truth)),
        "psnr_whole": psnr(images, sitter.target),
    }


def recreation_scores(panel: Panel, sitter: Sitter, images: Tensor) -> dict[str, Tensor]:
    """Figures of a person's pictures from noise: by the source caption, edits, backgrounds."""
    same = Edit(sitter.person, sitter.person, "hair")
    by_edits, by_backgrounds = images[1:-backgrounds_each], images[-backgrounds_each:]
    asked, _ = panel.verdicts(by_edits)
    background_free, _ = Panel(sitter.backgrounds).verdicts(by_backgrounds)
    drawn = pictures([edit.target for edit in sitter.backgrounds]).float() / 255
    behind = (1 - sitter.mask).expand(backgrounds_each, -1, -1)
    return {
        "identity_recreated": 100
        * identity_kept([same, *sitter.edits], images[:-backgrounds_each]),
        "recreated_edited": 100 * asked,
        "psnr_recreated": psnr(images[:1], sitter.source),
        "background_free": 100 * background_free,
        "psnr_background": psnr(by_backgrounds, drawn, behind),
    }


def measured(lab: Lab, sitter: Sitter, recipe: Recipe | None) -> Row:
    """Learn a person, edit, recreate, judge: the means over the person's edits."""
    model, clip = lab.model, lab.clip
    row: Row = {}
    if recipe is not None:
        model, clip, row = learned(lab, sitter, recipe)
    panel = Panel(sitter.edits)
    knows = recipe is not None
    pairs = [prompts(edit, knows) for edit in sitter.edits]
    texts = [pairs[0][0], *(prompts(e, knows)[1] for e in (*sitter.edits, *sitter.backgrounds))]
    started = time.perf_counter()
    images = edited(lab, model, clip, sitter, pairs)
    row["editing_seconds"] = (time.perf_counter() - started) / len(images)
    figures = {
        **scores(panel, sitter, images),
        **recreation_scores(panel, sitter, recreated(lab, model, clip, sitter, texts)),
    }
    return row | {figure: float(values.mean()) for figure, values in figures.items()}


def run(lab: Lab, options: argparse.Namespace, chosen: dict[str, Recipe | None]) -> list[Row]:
    """The mean of each row over all people; what the cache holds is not made again."""
    kept = Kept(options.cache)
    found: dict[str, list[Row]] = {method: [] for method in chosen}
    for sitter in sitters(lab, options.split, options.seed, options.count):
        for method, recipe in chosen.items():
            key = f"{options.format} {options.split} {options.seed} {sitter.number} {method}"
            found[method].append(kept.row(key, measured, lab, sitter, recipe))
    return [_summary(method, rows) for method, rows in found.items()]


def _summary(method: str, rows: list[Row]) -> Row:
    learned = [row for row in rows if "peak_mb" in row]
    if not learned:
        return mean_row(method, rows)
    # What else the machine had to do makes some of them far too long.
    seconds = statistics.median(row["learning_seconds"] for row in learned)
    peak = max(row["peak_mb"] for row in learned)
    return mean_row(method, rows) | {"learning_seconds": seconds, "peak_mb": peak}


def main() -> None:
    """Run all rows on the same people and report."""
    given = parser(__doc__, 40, cached=True)
    given.add_argument("--format", choices=["sd3", "flux"], default="sd3", help="the demo model")
    given.add_argument("--split", default="held-out", help="dev people are for choosing settings")
    options = given.parse_args()
    lab = Lab(options.format)
    lab.clip = shallow_clip(options.format)
    widgets = lab.defaults("PinpointLearnIdentity")
    chosen = recipes(widgets["token_steps"] + widgets["steps"])
    report(run(lab, options, chosen), columns, options.json, notes)


notes = (
    "Means over people and edits. The first columns are of edits by FlowEdit: identity_kept is 100 "
    "minus the mean error of the identity's 14 parameters as fitted to the picture, in percent of "
    "their ranges; attribute_edited and attributes_kept as in the sculptor bench; PSNR in dB, "
    "outside beyond 8 px of the true mask, against the source as the codec decodes it, whole "
    "against the true edit. recreated: from noise, by the source caption (psnr_recreated), by the "
    "target captions, and before two backgrounds that the picture does not have: background_free "
    "where the asked one is shown, psnr_background to it where no person is. cosine: mean |cos| of "
    "the learned word to the attribute words. learning_seconds: median. peak_mb: how much the "
    "process grew at most while learning. The text encoder has two of its layers, which changes "
    "nothing but the time."
)


if __name__ == "__main__":
    main()
