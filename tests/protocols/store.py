"""What a run has made so far, on disk: a row for each method and case, and the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cases import ProtocolError

Row = dict[str, Any]
Key = tuple[str, str]


class Store:
    """A folder of rows that an interrupted run goes on from.

    A row is written whole or, when the run ends in between, not read.
    """

    def __init__(self, folder: Path, about: Row):
        """
        Args:
            about: what makes two runs the same.

        Raises:
            ProtocolError: the folder holds another run.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file, text = folder / "run.json", json.dumps(about, indent=1, sort_keys=True)
        if file.exists() and file.read_text("utf-8") != text:
            before = json.loads(file.read_text("utf-8"))
            other = [key for key in about if before.get(key) != about[key]]
            raise ProtocolError(
                f"{folder} holds a run with another {', '.join(other) or 'setting'}: choose "
                "another --output, or delete that folder"
            )
        file.write_text(text, "utf-8")

    def rows(self, table: str) -> dict[Key, Row]:
        """The rows of a table by method and case."""
        file = self._file(table)
        if not file.exists():
            return {}
        text = file.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole, "utf-8")
        rows = [json.loads(line) for line in whole.splitlines()]
        return {(row["method"], row["case"]): row for row in rows}

    def add(self, table: str, row: Row) -> None:
        """Keep a row."""
        with self._file(table).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget_errors(self, table: str) -> None:
        """Drop the rows with errors, so that they are tried again."""
        rows = [row for row in self.rows(table).values() if not row.get("error")]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self._file(table).write_text(text, "utf-8")

    def picture(self, method: str, case: str) -> Path:
        """Where an edit lies."""
        return self.folder / "pictures" / method / f"{case}.png"

    def _file(self, table: str) -> Path:
        return self.folder / f"{table}.jsonl"
