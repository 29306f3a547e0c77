"""Text encoders that know learned words, written `<name>` in prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.sd import CLIP
from torch import Tensor

words_key = "pinpoint_words"
"""In a conditioning's dict: for each learned word that its prompt has, its rows."""

Vectors = Mapping[str, Tensor]
"""Input embeddings of one word, (n, width), by the keys of `CLIP.tokenize`."""


def with_words(clip: CLIP, words: Mapping[str, Vectors]) -> CLIP:
    """A clone of a text encoder that knows more words; of two with the same name, the newer."""
    raise NotImplementedError


def rows_of_words(clip: CLIP, tokens: dict[str, Any], length: int) -> dict[str, list[int]]:
    """The rows of the conditioning that each learned word in a prompt's tokens became.

    Args:
        tokens: what `tokenize` of a CLIP from `with_words` returned.
        length: rows of the conditioning.
    """
    raise NotImplementedError
