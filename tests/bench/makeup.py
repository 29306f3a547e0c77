"""Makeup transfer: the lips of one held-out portrait on another, with and without identity.

    python tests/bench/makeup.py --count 40 --seed 1 \\
        --cache tests/bench/results/makeup_people.json --json tests/bench/results/makeup.json

The look is learned as a word from the reference's mouth; no prompt names its colour. The judge
knows it, and knows what the first portrait would look like with it. Finished rows are kept in
`--cache`, from which an interrupted run goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import Tensor

from bench import identity
from bench.identity import Recipe, Sitter
from bench.lab import Kept, Lab, Row, arguments, mean_row, report, shallow_clip
from bench.portrait_scores import Panel
from portraits.dataset import Edit, people, pictures
from portraits.judging import drawn_values
from portraits.people import Portrait, caption

look, plain = "berry", "natural"
"""The learned word, and what stands in its place without it."""
makeup = {
    "name": look,
    "class_word": plain,
    "attributes": "hair, skin, eyes, hat, beard, glasses",
    "outside_weight": 0.0,
    # A word alone: a change of the model would be in both prompts, and an edit by their
    # difference would not see it.
    "steps": 0,
    "token_steps": 150,
    "token_rate": 0.1,
    "update_every": 5,
}
"""How the look is learned, beside Learn Identity's defaults."""
columns = [
    "method",
    "attribute_edited",
    "attributes_kept",
    "identity_kept",
    "psnr_outside",
    "psnr_whole",
    "learning_seconds",
]


@dataclass(frozen=True, eq=False)
class Transfer:
    """A portrait whose lips shall be the reference's."""

    sitter: Sitter
    reference: Portrait
    picture: Tensor
    mouth: Tensor


def transfers(lab: Lab, seed: int, count: int) -> Iterator[Transfer]:
    """Held-out people, each with a person of made-up lips of another colour, both seen."""
    others = (p for p in people("held-out references", seed, 100 * count) if _made_up(p))
    for sitter in identity.sitters(lab, "held-out", seed, count):
        lips = sitter.person.attributes["lips"]
        reference = next(p for p in others if p.attributes["lips"] != lips)
        target = sitter.person.having("lips", reference.attributes["lips"])
        changed = replace(
            sitter,
            edits=[Edit(sitter.person, target, "lips")],
            target=pictures([target]).float() / 255,
        )
        picture = pictures([reference]).float() / 255
        yield Transfer(changed, reference, picture, drawn_values([reference], "lips")[1])


def _made_up(person: Portrait) -> bool:
    return person.attributes["lips"] != plain


def worded(text: str, lips: str, *, knows: bool) -> str:
    """A caption with other words for the lips, and the person's own word if it is known."""
    phrases = [lips if phrase.endswith(" lips") else phrase for phrase in text.split(", ")]
    return identity.named(", ".join(phrases)) if knows else ", ".join(phrases)


@lru_cache(maxsize=1)
def learned_look(lab: Lab, transfer: Transfer) -> tuple[Any, float]:
    """The word for a reference's lips, which both rows of a pair use, and its seconds."""
    prompt = worded(caption(transfer.reference), f"<{look}> lips", knows=False)
    widgets = {**makeup, "prompt": prompt, "seed": transfer.sitter.number}
    found, cost = identity.learn(lab, transfer.picture, transfer.mouth, widgets)
    return found, cost["learning_seconds"]


def measured(lab: Lab, transfer: Transfer, *, knows: bool) -> Row:
    """Learn the look, and the person if asked; transfer; judge."""
    sitter, model, clip = transfer.sitter, lab.model, lab.clip
    found, seconds = learned_look(lab, transfer)
    started = time.perf_counter()
    if knows:
        model, clip, _ = identity.learned(lab, sitter, Recipe())
    model, clip = identity.applied(lab, model, clip, found, None)
    seconds += time.perf_counter() - started
    source = caption(sitter.person)
    own = f"{sitter.person.attributes['lips']} lips"
    before, after = (worded(source, lips, knows=knows) for lips in (own, f"<{look}> lips"))
    images = identity.edited(lab, model, clip, sitter, [(before, after)])
    return {"learning_seconds": seconds, **_means(sitter, images)}


def prompted(lab: Lab, transfer: Transfer) -> Row:
    """The same edit by the colour's name, which the model knows: what can be reached."""
    return _by_words(lab, transfer, transfer.sitter.edits[0].prompts)


def unprompted(lab: Lab, transfer: Transfer) -> Row:
    """The same edit by a word without weight: what the model draws of itself."""
    source, _ = transfer.sitter.edits[0].prompts
    return _by_words(lab, transfer, (source, worded(source, f"({plain}:0) lips", knows=False)))


def _by_words(lab: Lab, transfer: Transfer, prompts: tuple[str, str]) -> Row:
    sitter = transfer.sitter
    return _means(sitter, identity.edited(lab, lab.model, lab.clip, sitter, [prompts]))


def _means(sitter: Sitter, images: Tensor) -> Row:
    figures = identity.scores(Panel(sitter.edits), sitter, images)
    return {name: float(values.mean()) for name, values in figures.items()}


def main() -> None:
    """Run all rows on the same pairs and report."""
    options = arguments(__doc__, 40, cached=True)
    lab = Lab("sd3")
    lab.clip = shallow_clip("sd3")
    kept, rows = Kept(options.cache), dict[str, list[Row]]()
    methods: dict[str, Callable[..., Row]] = {
        "by the colour's name": prompted,
        "by a word without weight": unprompted,
        "makeup": partial(measured, knows=False),
        "makeup and identity": partial(measured, knows=True),
    }
    for transfer in transfers(lab, options.seed, options.count):
        for method, measure in methods.items():
            key = f"{options.seed} {transfer.sitter.number} {method}"
            rows.setdefault(method, []).append(kept.row(key, measure, lab, transfer))
    report([mean_row(method, found) for method, found in rows.items()], columns, options.json)


if __name__ == "__main__":
    main()
