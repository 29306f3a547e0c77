"""What runs have made so far, on disk: rows by what they depend on, and the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Store:
    """A folder of rows that an interrupted run goes on from.

    Every row has a `key`, which says what it depends on (see `keys`), so that runs with other
    cases, workflows, judges or sizes share a folder. A row is written whole or, when the run ends
    in between, not read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self, table: str) -> dict[str, Row]:
        """The rows of a table by key."""
        file = self._file(table)
        if not file.exists():
            return {}
        text = file.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            _replace(file, whole)
        return {row["key"]: row for row in map(json.loads, whole.splitlines())}

    def add(self, table: str, row: Row) -> None:
        """Keep a row."""
        with self._file(table).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget_errors(self, table: str) -> None:
        """Drop the rows with errors, so that they are tried again."""
        rows = [row for row in self.rows(table).values() if not row.get("error")]
        _replace(self._file(table), "".join(json.dumps(row) + "\n" for row in rows))

    def picture(self, method: str, case: str, key: str) -> Path:
        """Where an edit lies."""
        return self.folder / "pictures" / method / f"{case}_{key}.png"

    def mask(self, case: str) -> Path:
        """Where a case's mask lies, for the page."""
        return self.folder / "masks" / f"{case}.png"

    def _file(self, table: str) -> Path:
        return self.folder / f"{table}.jsonl"


def _replace(file: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one whenever this ends."""
    part = file.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(file)
