"""A run as one HTML page: the summary, and every case with its pictures and scores."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from .cases import Case, Protocol
from .store import Key, Row, Store
from .summary import Figure, errors, scale

_page = Template((Path(__file__).parent / "page.html").read_text("utf-8"))


def write(
    store: Store,
    protocol: Protocol,
    command: str,
    rows: Mapping[Key, Row],
    found: Sequence[Figure],
) -> Path:
    """Write index.html beside the pictures and return it."""
    methods = list(dict.fromkeys(method for method, _ in rows))
    target = store.folder / "index.html"
    target.write_text(
        _page.substitute(
            title=html.escape(f"Pinpoint: {protocol.name}"),
            command=html.escape(command),
            summary=_summary(found, errors(rows.values())),
            heads="".join(f"<th>{html.escape(method)}</th>" for method in methods),
            cases="\n".join(
                _case(store, case, methods, rows, protocol.scores) for case in protocol.cases
            ),
        ),
        "utf-8",
    )
    return target


def _summary(found: Sequence[Figure], failed: dict[str, int]) -> str:
    lines = [
        f"<tr><td>{html.escape(one.score)} {one.unit}</td><td>{html.escape(one.method)}</td>"
        f"<td>{one.count}</td><td>{one.mean:.4g}</td><td>{one.median:.4g}</td>"
        f"<td>{one.spread}</td></tr>"
        for one in found
    ]
    lines += [
        f"<tr class=error><td>errors</td><td>{html.escape(method)}</td><td>{count}</td></tr>"
        for method, count in failed.items()
        if count
    ]
    return "\n".join(lines)


def _case(
    store: Store,
    case: Case,
    methods: Iterable[str],
    rows: Mapping[Key, Row],
    scores: Sequence[str],
) -> str:
    source = Path(os.path.relpath(case.image, store.folder)).as_posix()
    cells = [
        f"<td><img src='{html.escape(source)}' alt=source><p>{html.escape(case.id)}</p>"
        f"<p>{html.escape(case.source_prompt)}</p><p>{html.escape(case.target_prompt)}</p></td>"
    ]
    for method in methods:
        row = rows.get((method, case.id))
        cells.append(f"<td>{_edit(store, row, scores) if row else ''}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _edit(store: Store, row: Row, scores: Sequence[str]) -> str:
    if row.get("error"):
        return f"<p class=error>{html.escape(row['error'])}</p>"
    picture = store.picture(row["method"], row["case"]).relative_to(store.folder).as_posix()
    lines = [f"<img src='{html.escape(picture)}' alt=edit>"]
    for score in (*scores, "seconds"):
        value = row["scores"].get(score)
        if value is not None:
            factor, unit = scale(score)
            lines.append(f"<p>{html.escape(score)}: {value * factor:.4g} {unit}</p>")
    return "".join(lines)
