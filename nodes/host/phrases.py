"""Words of a prompt, and where they lie in the CONDITIONING that a CLIP makes of it.

Phrases are looked for in the prompt itself. What its tokens spell is laid along it, so that every
kind of tokenizer is read the same way.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, takewhile
from typing import Any, NamedTuple

from comfy import sd1_clip
from comfy.sd import CLIP

from . import encoders

# With the commas and full stops of Chinese and Japanese.
_separator = re.compile(r"[,\n\uff0c\u3001]")
_clause_end = re.compile(r"[,;\n\uff0c\u3001\uff1b\u3002]|[.!?:]+(?=\s|$)")
_spaced = re.compile(r"[^\s,;\uff0c\u3001\uff1b\u3002]+")
# For tokens that spell nothing: T5's <unk>, and the vectors of a textual inversion.
_unknown, _embedding = "\ufffd", "\ufffc"


Tokens = list[tuple[int, Any]]
"""Their places, and what the text encoder gets: numbers, or vectors of a textual inversion."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model gets it, and where its words are.

    Attributes:
        conditioning: what CLIP Text Encode returns; its tensors are (1, tokens, width).
        positions: phrase -> the tokens of all its occurrences, ascending, along dimension 1.
        words: the prompt's tokens except for punctuation, ascending. What the encoder adds (start,
            end, padding, a template) is not among them.
    """

    conditioning: list[Any]
    positions: dict[str, list[int]]
    words: list[int]


class _Atom(NamedTuple):
    """The least that is compared: a word, a Chinese character, a digit or a sign."""

    key: str
    start: int
    stop: int
    kind: str


def split_phrases(text: str) -> list[str]:
    """The phrases of a widget's text, separated by commas or line breaks, each of them once."""
    phrases: dict[str, str] = {}
    for part in _separator.split(text):
        phrase = " ".join(part.split())
        phrases.setdefault(phrase.casefold(), phrase)
    return [phrase for phrase in phrases.values() if phrase]


def changed_phrases(
    source: str, target: str, *, whole: bool = False
) -> tuple[list[str], list[str]]:
    """The words in which two prompts differ, (only in the source, only in the target).

    Words that follow each other are one phrase, unless a comma or the end of a sentence parts
    them. Capitals, punctuation and prompt weights make no difference.

    Args:
        whole: give the clauses that hold these words ("red hat") instead of the words ("red").
    """
    texts = _plain(source), _plain(target)
    words = [_words(text) for text in texts]
    changed: tuple[set[int], set[int]] = set(), set()
    for tag, a, b, c, d in _differences(*words):
        if tag != "equal":
            changed[0].update(range(a, b))
            changed[1].update(range(c, d))
    removed, added = (_runs(*side, whole) for side in zip(texts, words, changed, strict=True))
    return removed, added


def mentioned(prompt: str, phrases: Iterable[str]) -> list[str]:
    """Those of some phrases that a prompt has, found as `encode_with_positions` finds them."""
    atoms = _atoms(_plain(prompt))
    return [phrase for phrase in phrases if _found(atoms, phrase)]


def place_of(prompt: str, phrase: str) -> int | None:
    """Where a phrase begins first in a prompt, found as `encode_with_positions` finds it."""
    atoms = _atoms(prompt)
    found = _found(atoms, phrase)
    return atoms[found[0]].start if found else None


def split_clauses(prompt: str) -> list[str]:
    """What stands between commas or line breaks, together with the one in front of it."""
    return re.split(f"(?={_separator.pattern})", prompt)


def own_tokens(clip: CLIP, text: str) -> dict[str, list[Any]]:
    """A text's own tokens in each text encoder, numbers or vectors: no start, end or padding."""
    tokens, template = (clip.tokenize(t, return_word_ids=True) for t in (text, ""))
    own = {key: _between(*(_listed(clip, key, t) for t in (tokens, template))) for key in tokens}
    return {key: [token for _, token in listed] for key, listed in own.items()}


def encode_with_positions(
    clip: CLIP, text: str, phrases: Iterable[str], name: str, phrases_name: str = "phrases"
) -> EncodedPrompt:
    """Encode a prompt as CLIP Text Encode does, and find phrases in the result.

    A phrase is found wherever it stands in whole words, in capitals or not; where a script has no
    capitals, and often no spaces (Chinese, Korean, Arabic), inside words too.

    Args:
        name: the input that the prompt came from, for errors.
        phrases_name: the input that the phrases came from, for errors.

    Raises:
        ValueError: no text encoder or one of an unknown kind, an empty prompt, or a phrase that is
            not in the prompt or that the tokenizer leaves out.
    """
    if clip is None:
        raise ValueError("clip is empty, as the checkpoint has no text encoder: use Load CLIP")
    if not text.strip():
        raise ValueError(f"{name} is empty: describe the picture in words")
    encoders.rows_of(clip.cond_stage_model)
    atoms = _atoms(_plain(text))
    found = {phrase: _found(atoms, phrase) for phrase in phrases}
    for phrase, occurrences in found.items():
        if not occurrences:
            prompt = textwrap.shorten(text, 300, placeholder=" ...")
            raise ValueError(
                f"{phrases_name} has '{phrase}', which is not in {name} ('{prompt}'): use words of "
                "that prompt"
            )
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    rows, words = _rows(clip, text, atoms, conditioning[0][0].shape[1])
    positions = {p: sorted(set().union(*(rows[i] for i in o))) for p, o in found.items()}
    for phrase, tokens in positions.items():
        if not tokens:
            raise ValueError(
                f"{phrases_name} has '{phrase}', for which the text encoder has no tokens: say it "
                f"in other words, also in {name}"
            )
    return EncodedPrompt(conditioning, positions, sorted(words))


def _plain(prompt: str) -> str:
    """A prompt without its weights, and without the backslashes before its brackets."""
    parts = sd1_clip.token_weights(sd1_clip.escape_important(prompt), 1.0)
    return sd1_clip.unescape_important("".join(part for part, _ in parts))


def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Lo":
        return "uncased"
    if category[0] == "L" or char == _unknown:
        return "letter"
    return {"M": "mark", "N": "digit", "P": "punctuation", "S": "symbol"}.get(category[0], "space")


def _atom(text: str, start: int, stop: int, kind: str) -> _Atom:
    key = unicodedata.normalize("NFKC", text[start:stop]).casefold()
    return _Atom(key, start, stop, kind)


def _atoms(text: str, first: int = 0, last: int | None = None) -> list[_Atom]:
    """Digits one by one, as CLIP has them, and so the characters of scripts without spaces."""
    spans: list[tuple[int, int, str]] = []
    for at, kind in enumerate(map(_kind, text[first:last]), first):
        start, stop, before = spans[-1] if spans else (0, -1, "")
        if at == stop and (kind == "mark" or kind == before == "letter"):
            spans[-1] = (start, at + 1, before)
        elif kind != "space":
            spans.append((at, at + 1, kind))
    return [_atom(text, *span) for span in spans]


def _is_cut(before: _Atom, after: _Atom) -> bool:
    """Whether a phrase that ended between two atoms would cut a word or a number."""
    return before.stop == after.start and {before.kind, after.kind} <= {"letter", "digit"}


def _occurrences(atoms: list[_Atom], sought: list[_Atom]) -> list[int]:
    """The atoms of all places where a phrase's atoms stand."""
    found: list[int] = []
    for start in range(len(atoms) - len(sought) + 1 if sought else 0):
        stop = start + len(sought)
        same = all(a.key == b.key for a, b in zip(atoms[start:stop], sought, strict=True))
        inner = [at for at in (start, stop) if 0 < at < len(atoms)]
        if same and not any(_is_cut(atoms[at - 1], atoms[at]) for at in inner):
            found += range(start, stop)
    return found


def _found(atoms: list[_Atom], phrase: str) -> list[int]:
    """Where a prompt has a phrase, which may have been copied with its weights."""
    return _occurrences(atoms, _atoms(phrase)) or _occurrences(atoms, _atoms(_plain(phrase)))


def _words(text: str) -> list[_Atom]:
    """What stands between spaces and commas without punctuation around it, as one atom each."""
    words = []
    for match in _spaced.finditer(text):
        atoms = [a for a in _atoms(text, *match.span()) if a.kind != "punctuation"]
        if atoms and all(atom.kind != "uncased" for atom in atoms):
            atoms = [_atom(text, atoms[0].start, atoms[-1].stop, "word")]
        words += atoms
    return words


def _runs(text: str, words: list[_Atom], changed: set[int], whole: bool) -> list[str]:
    """What the changed words of each clause say, or the clauses that have any."""
    clauses: list[list[int]] = []
    for i, word in enumerate(words):
        if i and not _clause_end.search(text, words[i - 1].stop, word.start):
            clauses[-1].append(i)
        else:
            clauses.append([i])
    runs = []
    for clause in clauses:
        for is_changed, group in groupby(clause, changed.__contains__):
            run = clause if whole else list(group)
            if is_changed:
                runs.append(text[words[run[0]].start : words[run[-1]].stop])
    return list(dict.fromkeys(runs))


def _differences(ours: list[_Atom], theirs: list[_Atom]) -> list[tuple[str, int, int, int, int]]:
    a, b = ([atom.key for atom in side] for side in (ours, theirs))
    return list(SequenceMatcher(None, a, b, autojunk=False).get_opcodes())


def _rows(
    clip: CLIP, text: str, atoms: list[_Atom], length: int
) -> tuple[list[set[int]], set[int]]:
    """The conditioning's rows of each atom of the prompt, and those of all its words."""
    tokens, template = (clip.tokenize(t, return_word_ids=True) for t in (text, ""))
    spans = encoders.token_rows(clip, tokens, length)
    rows: list[set[int]] = [set() for _ in atoms]
    words: set[int] = set()
    for key, span in spans.items():
        own = _between(_listed(clip, key, tokens), _listed(clip, key, template))
        placed = [(span.start + at, token) for at, token in own]
        inside = [(row, token) for row, token in placed if 0 <= row < span.stop]
        spelled, owners = _spelled(inside, encoders.part(clip.tokenizer, key).inv_vocab)
        theirs = _atoms(spelled)
        held = [set().union(*owners[atom.start : atom.stop]) for atom in theirs]
        words.update(*(h for h, a in zip(held, theirs, strict=True) if a.kind != "punctuation"))
        for found, place in zip(rows, _aligned(atoms, theirs), strict=True):
            found.update(*held[place])
    return rows, words


def _aligned(ours: list[_Atom], theirs: list[_Atom]) -> list[slice]:
    """Those of their atoms that each of ours stands for, mostly the one that is the same.

    A tokenizer may not know a letter, write a fraction in digits, keep the brackets of weights
    that it does not take, or put vectors for the name of a textual inversion.
    """
    places = [slice(0)] * len(ours)
    for _, a, b, c, d in _differences(ours, theirs):
        for i in range(b - a):
            places[a + i] = slice(c + i, c + i + 1) if b - a == d - c else slice(c, d)
    return places


def _listed(clip: CLIP, key: str, tokens: dict[str, Any]) -> Tokens:
    """Without start, end and padding, which ComfyUI marks as word 0."""
    listed, first = [], 0
    for section in tokens[key]:
        # Vectors for another text encoder are left out, and made up for by padding.
        used = [entry for entry in section if encoders.fits(clip, key, entry[0])]
        listed += [(at, token) for at, (token, _, word) in enumerate(used, first) if word]
        first += len(section)
    return listed


def _between(tokens: Tokens, template: Tokens) -> Tokens:
    """The prompt's tokens: without those that begin and end an empty prompt, too."""
    ids, empty = ([t if isinstance(t, int) else -1 for _, t in side] for side in (tokens, template))
    front = _common(ids, empty)
    back = _common(ids[front:][::-1], empty[front:][::-1])
    return tokens[front : len(tokens) - back]


def _common(ids: list[int], others: list[int]) -> int:
    pairs = zip(ids, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _spelled(tokens: Tokens, names: dict[int, str]) -> tuple[str, list[set[int]]]:
    """The text that tokens stand for, and for each character the rows of its tokens."""
    decode = _sentencepiece if "\u2581" in names.values() else _byte_pairs
    spelled, rows = b"", []
    for row, token in tokens:
        is_word = isinstance(token, int)
        piece = decode(names.get(token, "")) if is_word else f" {_embedding} ".encode()
        spelled += piece
        rows += [row] * len(piece)
    text, owners, at = spelled.decode("utf-8", "surrogateescape"), [], 0
    for char in text:
        size = len(char.encode("utf-8", "surrogateescape"))
        owners.append(set(rows[at : at + size]))
        at += size
    return text, owners


def _sentencepiece(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("<unk>", _unknown).replace("\u2581", " ").encode()


_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_byte_of = {chr(byte): byte for byte in _printable}
_byte_of |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_printable}))}


def _byte_pairs(piece: str) -> bytes:
    """GPT-2's letters for bytes; CLIP ends words with a mark where others begin with a space."""
    chars = piece.removesuffix("</w>")
    spelled = b"".join(bytes([_byte_of[c]]) if c in _byte_of else c.encode() for c in chars)
    return spelled + b" " * (chars != piece)
