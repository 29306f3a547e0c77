"""What an edit and its scores depend on, as short keys that change with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from .cases import BadCase, Case, opened
from .judging import Judges


def key(*parts: Any) -> str:
    """A short hash of what JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def of_edit(case: Case, seed: int, size: int | None) -> str:
    """Of what a workflow is given."""
    prompts = [case.source_prompt, case.target_prompt, case.instruction]
    return key(case.id, prompts, seed, size, _content(case.image))


def of_scores(case: Case, judges: Judges, attributes: Mapping[str, Sequence[str]]) -> str:
    """Of what an edit is judged by."""
    shown = [_content(path) for path in case.references]
    asked = [case.attribute, case.value, case.drawn and dict(case.drawn)]
    return key(asdict(judges), _mask(case), shown, asked, dict(attributes))


def of_words(
    case: Case, size: int | None, judges: Judges, attributes: Mapping[str, Sequence[str]]
) -> str:
    """Of what a CLIP says of a source."""
    return key(_content(case.image), size, judges.clip, judges.clip_vision, dict(attributes))


def _mask(case: Case) -> str:
    if case.mask is None:
        return ""
    try:
        mask = case.mask(opened(case.image).size)
    except BadCase as error:
        return str(error)
    return hashlib.sha256(mask.tobytes()).hexdigest()


def _content(path: Path) -> str:
    """Of a file; "" if there is none, so that one that comes later is something new."""
    try:
        stat = path.stat()
        return _hashed(path, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return ""


@cache
def _hashed(path: Path, _changed: int, _length: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
