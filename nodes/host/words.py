"""Text encoders that know learned words, written `<name>` in prompts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from comfy.sd import CLIP
from torch import Tensor

from . import encoders

log = logging.getLogger(__name__)

words_key = "pinpoint_words"
"""In a conditioning's dict: the rows of each learned word in its prompt, see `rows_of_words`."""

Vectors = Mapping[str, Tensor]
"""Input embeddings of one word, (n, width), by the keys of `CLIP.tokenize`."""
Tokens = dict[str, Any]
"""Of each text encoder, by its key: sections of (number or vector, weight, ...)."""

_written = re.compile(r"<([A-Za-z0-9_-]+)>")
_stand_ins = ("river", "window", "summer", "doctor", "coffee", "bridge", "paper", "winter")
"""Each of them one token for every tokenizer. They hold learned words' places in a prompt."""
_tag = "pinpoint_word"
"""Attribute of a token's vector: the name of its word."""


def with_words(clip: CLIP, words: Mapping[str, Vectors]) -> CLIP:
    """A clone of a text encoder that knows more words; of two with the same name, the newer.

    A text encoder for which a word has no vectors reads the prompt without that word. Capitals in
    names make no difference.

    Args:
        words: vectors of each word, by its name. They are used as they are, so that gradients
            reach them.
    """
    known = clip.words if isinstance(clip, WordCLIP) else {}
    return _knowing(clip.clone(), {**known, **{name.casefold(): v for name, v in words.items()}})


def known_words(clip: CLIP) -> list[str]:
    """The names that a text encoder knows, without capitals."""
    return list(clip.words) if isinstance(clip, WordCLIP) else []


def unknown_words(clip: CLIP, text: str) -> list[str]:
    """The names in a text, `<name>`, that a text encoder does not know."""
    known = known_words(clip)
    return [match[1] for match in _written.finditer(text) if match[1].casefold() not in known]


class WordCLIP(CLIP):
    """A text encoder, as ComfyUI has it, that knows learned words."""

    words: dict[str, Vectors]

    def clone(self, *args: Any, **kwargs: Any) -> CLIP:
        """As ComfyUI's; the clone knows the same words."""
        return _knowing(super().clone(*args, **kwargs), self.words)

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Tokens:
        """As ComfyUI's, with the vectors of learned words in their places.

        Raises:
            ValueError: a tokenizer that no stand-in passes whole, or a prompt with all of them.
        """
        written = [match[1] for match in _written.finditer(text)]
        names = [name.casefold() for name in written if name.casefold() in self.words]
        # In the log alone: the page would leave it on CLIP Text Encode for good.
        for name in sorted({n for n in written if n.casefold() not in self.words}):
            log.warning(f"Pinpoint: no identity of the name {name} is applied: <{name}> stays text")
        if not names:
            return super().tokenize(text, return_word_ids, **kwargs)
        free = [stand_in for stand_in in _stand_ins if stand_in not in text.casefold()]
        if not free:
            raise ValueError(
                f"prompt has all of the words {', '.join(_stand_ins)}, of which one has to be free "
                f"to hold the place of <{names[0]}>: leave one out"
            )
        for stand_in in free:
            tokens = self._tokenized(text, names, stand_in, return_word_ids, **kwargs)
            if tokens is not None:
                return tokens
        raise ValueError(
            f"clip cannot place <{names[0]}>, because its tokenizer changes the words of the "
            "prompt: write the prompt in other words, or use another text encoder"
        )

    def _tokenized(
        self, text: str, names: list[str], stand_in: str, return_word_ids: bool, **kwargs: Any
    ) -> Tokens | None:
        """None if not every stand-in comes out as one token."""
        spellings: dict[tuple[int, ...], Tokens] = {}
        tokens = super().tokenize("", return_word_ids, **kwargs)
        for key in tokens:
            vectors = {name: self.words[name].get(key, ()) for name in names}
            counts = tuple(len(vectors[name]) for name in names)
            if counts not in spellings:
                spelled = self._spelled(text, iter(counts), stand_in)
                spellings[counts] = super().tokenize(spelled, return_word_ids, **kwargs)
            sections = spellings[counts][key]
            if any(counts):
                rows = [_tagged(row, name) for name in names for row in vectors[name]]
                pieces = encoders.part(self.tokenizer, key).inv_vocab
                sections = _replaced(sections, stand_in, pieces, rows)
            if sections is None:
                return None
            tokens[key] = sections
        return tokens

    def _spelled(self, text: str, counts: Iterator[int], stand_in: str) -> str:
        """The prompt with each learned word's stand-in, as often as it has vectors."""

        def spell(match: re.Match[str]) -> str:
            if match[1].casefold() not in self.words:
                return match[0]
            # What touches a word would become a part of it.
            before = " " if text[: match.start()][-1:].strip() else ""
            after = " " if text[match.end() :][:1].isalnum() else ""
            return before + " ".join([stand_in] * next(counts)) + after

        return _written.sub(spell, text)

    def encode_from_tokens_scheduled(self, tokens: Tokens, *args: Any, **kwargs: Any) -> list[Any]:
        """As ComfyUI's; what it returns says which rows are learned words'."""
        encoded = super().encode_from_tokens_scheduled(tokens, *args, **kwargs)
        if not any(_is_learned(entry[0]) for key in tokens for s in tokens[key] for entry in s):
            return encoded
        try:
            encoders.rows_of(self.cond_stage_model)
        except ValueError:
            # The words work in every text encoder; where they lie is known of some.
            return encoded
        return [
            [cond, {**entries, words_key: rows_of_words(self, tokens, cond.shape[1])}]
            for cond, entries in encoded
        ]


def rows_of_words(clip: CLIP, tokens: Tokens, length: int) -> dict[str, list[int]]:
    """The rows of the conditioning that each learned word in a prompt's tokens became.

    Args:
        tokens: what `tokenize` of a CLIP from `with_words` returned.
        length: rows of the conditioning.

    Returns:
        Rows by name without capitals, ascending, of all its occurrences in all text encoders.

    Raises:
        ValueError: a text encoder of an unknown kind.
    """
    rows: dict[str, set[int]] = {}
    for key, span in encoders.token_rows(clip, tokens, length).items():
        first = span.start
        for section in tokens[key]:
            # Vectors for another text encoder are left out, and made up for by padding.
            used = [entry[0] for entry in section if encoders.fits(clip, key, entry[0])]
            for row, token in enumerate(used, first):
                if _is_learned(token) and 0 <= row < span.stop:
                    rows.setdefault(getattr(token, _tag), set()).add(row)
            first += len(section)
    return {name: sorted(found) for name, found in rows.items()}


def _knowing(clip: CLIP, words: dict[str, Vectors]) -> CLIP:
    """The same text encoder object for ComfyUI, with words."""
    knowing = WordCLIP(no_init=True)
    knowing.__dict__.update(vars(clip))
    knowing.words = words
    return knowing


def _tagged(row: Tensor, name: str) -> Tensor:
    setattr(row, _tag, name)
    return row


def _is_learned(token: Any) -> bool:
    return hasattr(token, _tag)


def _replaced(
    sections: list[list[tuple]], stand_in: str, pieces: Mapping[int, str], rows: list[Tensor]
) -> list[list[tuple]] | None:
    """Tokens with vectors for their stand-ins, in order; None if there are not as many of each."""
    left = iter(rows)

    def replaced(entry: tuple) -> tuple:
        piece = pieces.get(entry[0], "") if isinstance(entry[0], int) else ""
        # Tokenizers mark the beginnings or the ends of words.
        if piece.removesuffix("</w>").lstrip("\u2581\u0120") != stand_in:
            return entry
        return (next(left), *entry[1:])

    try:
        found = [[replaced(entry) for entry in section] for section in sections]
    except StopIteration:
        return None
    return None if next(left, None) is not None else found
