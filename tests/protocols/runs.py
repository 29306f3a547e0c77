"""A run of a protocol: edits, then scores, then a summary and a page; each part can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from host.client import Client
from host.prompts import PromptFailed, PromptInterrupted

from . import drawn, judging, page, summary
from .cases import BadCase, Case, Protocol, at_size_of, limited, opened, scaled
from .judging import Judges
from .running import Method
from .store import Row, Store

failures = (BadCase, PromptFailed, PromptInterrupted)
"""What one case can suffer while the others go on."""


@dataclass(frozen=True)
class Run:
    """What is run, and where it is kept.

    Attributes:
        seed: of cases without one.
        size: the longer side that pictures are scaled to; None leaves them.
        timeout: of one edit, in seconds.
    """

    protocol: Protocol
    store: Store
    judges: Judges
    seed: int
    size: int | None
    timeout: float

    def edit(self, client: Client, methods: Sequence[Method]) -> None:
        """Edit what has not been edited yet, method by method, so that models stay loaded."""
        done, cases = self.store.rows("edits"), self.protocol.cases
        for method in methods:
            for number, case in enumerate(cases, 1):
                if (method.name, case.id) in done:
                    continue
                row: Row = {"method": method.name, "case": case.id}
                try:
                    row["seconds"] = self._edit(client, method, case)
                except failures as error:
                    row["error"] = str(error)
                self.store.add("edits", row)
                told = row.get("error") or f"{row['seconds']:.1f} s"
                print(f"{method.name} {number}/{len(cases)} {case.id}: {told}", flush=True)

    def _edit(self, client: Client, method: Method, case: Case) -> float:
        seed = self.seed if case.seed is None else case.seed
        edit, seconds = method.edit(client, case, self._source(case), seed, self.timeout)
        file = self.store.picture(method.name, case.id)
        file.parent.mkdir(parents=True, exist_ok=True)
        edit.save(file)
        return seconds

    def score(self, client: Client) -> None:
        """Score the edits that have not been scored yet."""
        done = self.store.rows("scores")
        cases = {case.id: case for case in self.protocol.cases}
        for key, made in self.store.rows("edits").items():
            method, name = key
            if key in done or name not in cases:
                continue
            row: Row = {"method": method, "case": name, "error": made.get("error")}
            try:
                if not row["error"]:
                    found = self._score(client, cases[name], self.store.picture(*key))
                    row["scores"] = {**found, "seconds": made["seconds"]}
            except failures as error:
                row["error"] = str(error)
                print(f"{method} {name}: {error}", flush=True)
            self.store.add("scores", row)

    def _score(self, client: Client, case: Case, file: Path) -> judging.Scores:
        source, edit = self._source(case), opened(file)
        if not case.references:
            edit = at_size_of(source, edit)
        found = judging.score(client, self.judges, case, source, edit)
        seen = self._words(client, case, source, edit)
        return {**found, **judging.attribute_scores(case, *seen)} if seen else found

    def _words(
        self, client: Client, case: Case, source: Image.Image, edit: Image.Image
    ) -> tuple[dict[str, str], dict[str, str]] | None:
        """What of the attributes was to be seen, and what the edit shows; None if none can tell."""
        if case.drawn:
            return drawn.words(case, edit)
        attributes, judges = self.protocol.attributes, self.judges
        if not (attributes and judges.clip and judges.clip_vision):
            return None
        before, after = (
            judging.clip_words(client, judges, picture, attributes) for picture in (source, edit)
        )
        return before, after

    def _source(self, case: Case) -> Image.Image:
        picture = opened(case.image)
        return scaled(picture, limited(picture.size, self.size))

    def finish(self, command: str) -> None:
        """Print the summary, write it, and write the page."""
        wanted = {case.id: case for case in self.protocol.cases}
        rows = {key: row for key, row in self.store.rows("scores").items() if key[1] in wanted}
        good = summary.shared(rows.values())
        found = self._figures(good, wanted)
        failed = summary.errors(rows.values())
        common = len({row["case"] for row in good})
        text = "\n".join(
            [
                f"Over the {common} of {len(wanted)} cases that every method has made:\n",
                summary.table(found) + "\n",
                *(f"{method}: {number} errors" for method, number in failed.items() if number),
            ]
        )
        print(text)
        folder = self.store.folder
        (folder / "summary.md").write_text(f"`{command}`\n\n{text}\n", "utf-8")
        groups: dict[str, list[str]] = {}
        for case in wanted.values():
            groups.setdefault(case.group, []).append(case.id)
        written = {
            "command": command,
            "cases": common,
            "errors": failed,
            "all": [asdict(figure) for figure in found],
            "groups": {
                name: [asdict(figure) for figure in self._figures(good, ids)]
                for name, ids in groups.items()
            },
        }
        (folder / "summary.json").write_text(json.dumps(written, indent=1) + "\n", "utf-8")
        made = page.write(self.store, self.protocol, command, rows, found)
        print(made.absolute())

    def _figures(self, rows: Iterable[Row], ids: Iterable[str]) -> list[summary.Figure]:
        # Edits of one picture, or of one subject, turn out alike.
        clusters = {case.id: str(case.image) for case in self.protocol.cases}
        chosen = set(ids)
        some = [row for row in rows if row["case"] in chosen]
        return summary.figures(some, self.protocol.scores, clusters)
