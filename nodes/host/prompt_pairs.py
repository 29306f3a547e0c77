"""Two prompts as the model gets them, and which of their tokens belong together."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...kernels.prompt_to_prompt import MapEdit, token_mapping
from . import encoders, phrases

Mode = Literal["replace", "refine"]

largest_weight = 100.0


@dataclass(frozen=True)
class Prompts:
    """A source and a target prompt.

    Attributes:
        source, target: conditionings.
        edit: how maps of the target's tokens are made of the source's.
        blend: of the words to which an edit is held, the weight of each token in either prompt,
            (S,) and (T,); zeros where a prompt has none of them. None if there are no words.
    """

    source: list[Any]
    target: list[Any]
    edit: MapEdit
    blend: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Wording:
    """What a person writes.

    Attributes:
        source, target: prompts.
        mode: whether words that stand in place of others look where those looked ("replace"), or
            like new words where they themselves look ("refine").
        weights: of phrases of the target, "smile: 2, red hat: 0.5", or empty.
        blend: phrases of either prompt with commas between them, or empty.
    """

    source: str
    target: str
    mode: Mode = "replace"
    weights: str = ""
    blend: str = ""

    def encoded(self, clip: CLIP) -> Prompts:
        """Both prompts, encoded as CLIP Text Encode does.

        Raises:
            ValueError: an empty prompt, weights that cannot be read, phrases that are in none of
                the prompts, or a text encoder of an unknown kind.
        """
        weights = read_weights(self.weights)
        wanted = phrases.split_phrases(self.blend)
        held = [phrases.mentioned(text, wanted) for text in (self.source, self.target)]
        for phrase in wanted:
            if not any(phrase in found for found in held):
                raise ValueError(
                    f"blend_words has '{phrase}', which is neither in source_prompt nor in "
                    "target_prompt: use words of one of them"
                )
        source = phrases.encode_with_positions(
            clip, self.source, held[0], "source_prompt", "blend_words"
        )
        target = phrases.encode_with_positions(
            clip, self.target, [*held[1], *weights], "target_prompt", "reweight"
        )
        lengths = [each.conditioning[0][0].shape[1] for each in (source, target)]
        factors = torch.ones(lengths[1])
        for phrase, weight in weights.items():
            factors[target.positions[phrase]] = weight
        columns = []
        for prompt, length, found in zip((source, target), lengths, held, strict=True):
            column = torch.zeros(length)
            for phrase in found:
                column[prompt.positions[phrase]] = 1
            columns.append(column)
        edit = MapEdit(_mapping(clip, self, lengths), factors)
        blend = (columns[0], columns[1]) if wanted else None
        return Prompts(source.conditioning, target.conditioning, edit, blend)


def read_weights(text: str) -> dict[str, float]:
    """Weights of phrases: "smile: 2, red hat: 0.5".

    Raises:
        ValueError: a part that is not a phrase, a colon and a number.
    """
    weights = {}
    for part in phrases.split_phrases(text):
        phrase, _, number = part.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not phrase.strip() or not abs(weight) <= largest_weight:
            raise ValueError(
                f"reweight has '{part}': write a phrase of the target prompt, a colon and a number "
                f"from -{largest_weight:g} to {largest_weight:g}, as in smile: 2"
            )
        weights[phrase.strip()] = weight
    return weights


@dataclass(frozen=True)
class _Placed:
    """What one tokenizer made of a prompt: rows of the conditioning, and what lies there.

    Attributes:
        words: the prompt's own tokens (and a template's).
        added: start, end and padding.
    """

    words: dict[int, Hashable]
    added: dict[int, Hashable]


def _mapping(clip: CLIP, wording: Wording, lengths: list[int]) -> Tensor:
    """(S, T), see `token_mapping`, over all rows of two conditionings.

    What the encoder adds before and after the words stands for its like, counted from the front.
    """
    mapping = torch.zeros(*lengths)
    source, target = (
        _placed(clip, text, length)
        for text, length in zip((wording.source, wording.target), lengths, strict=True)
    )
    for key in target:
        a, b = source[key].words, target[key].words
        swapped = wording.mode == "replace"
        found = token_mapping(list(a.values()), list(b.values()), swapped=swapped)
        mapping[torch.tensor([*a]).long()[:, None], torch.tensor([*b]).long()] = found
        ends = zip(source[key].added.items(), target[key].added.items(), strict=False)
        for (row, token), (column, other) in ends:
            mapping[row, column] = float(token == other)
    return mapping


def _placed(clip: CLIP, text: str, length: int) -> dict[str, _Placed]:
    """Of each tokenizer; of several that share their rows, the first."""
    tokens = clip.tokenize(text, return_word_ids=True)
    spans: dict[range, str] = {}
    for key, span in encoders.token_rows(clip, tokens, length).items():
        spans.setdefault(span, key)
    return {key: _placed_in(clip, key, tokens[key], span) for span, key in spans.items()}


def _placed_in(clip: CLIP, key: str, sections: list[Any], span: range) -> _Placed:
    placed, first = _Placed({}, {}), span.start
    for section in sections:
        # As the text encoder does, vectors for another one are left out.
        used = [entry for entry in section if encoders.fits(clip, key, entry[0])]
        for row, (token, _, word) in enumerate(used, first):
            if 0 <= row < span.stop:
                (placed.words if word else placed.added)[row] = _comparable(token)
        first += len(section)
    return placed


def _comparable(token: int | Tensor) -> Hashable:
    """A token's number, or the bytes of a textual inversion's vector."""
    if isinstance(token, int):
        return token
    return token.detach().float().cpu().numpy().tobytes()
