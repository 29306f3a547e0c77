"""What a run has found: printed, as summary.md and summary.json, and as a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from . import page, summary
from .cases import Protocol
from .runs import Job, Run
from .store import Row


def write(run: Run, jobs: Sequence[Job], command: str) -> None:
    """Print the summary of what there is, write it, and write the page."""
    protocol, folder, rows = run.protocol, run.store.folder, run.rows(jobs)
    good = summary.shared(rows)
    found = _figures(protocol, good, [case.id for case in protocol.cases])
    failed = summary.errors(rows)
    common = len({row["case"] for row in good})
    text = "\n".join(
        [
            f"Over the {common} of {len(protocol.cases)} cases that every method has made:\n",
            summary.table(found) + "\n",
            *(f"{method}: {number} errors" for method, number in failed.items() if number),
            *summary.not_measured(protocol, found, asdict(run.judges)),
        ]
    )
    print(text)
    (folder / "summary.md").write_text(f"`{command}`\n\n{text}\n", "utf-8")
    groups: dict[str, list[str]] = {}
    for case in protocol.cases:
        groups.setdefault(case.group, []).append(case.id)
    written = {
        "command": command,
        "cases": common,
        "errors": failed,
        "all": [asdict(figure) for figure in found],
        "groups": {
            name: [asdict(figure) for figure in _figures(protocol, good, ids)]
            for name, ids in groups.items()
        },
    }
    (folder / "summary.json").write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    made = page.write(run.store, protocol, command, rows, found)
    print(made.absolute())


def _figures(protocol: Protocol, rows: Iterable[Row], ids: Iterable[str]) -> list[summary.Figure]:
    # Edits of one picture, or of one subject, turn out alike.
    clusters = {case.id: str(case.image) for case in protocol.cases}
    chosen = set(ids)
    some = [row for row in rows if row["case"] in chosen]
    return summary.figures(some, protocol.scores, clusters)
