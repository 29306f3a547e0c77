"""A run as one HTML page: the summary, and every case with its pictures and scores."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from urllib.parse import quote

from .cases import BadCase, Case, Protocol, opened
from .store import Row, Store
from .summary import Figure, errors, scale

_page = Template((Path(__file__).parent / "page.html").read_text("utf-8"))


def write(
    store: Store,
    protocol: Protocol,
    command: str,
    rows: Sequence[Row],
    found: Sequence[Figure],
) -> Path:
    """Write index.html beside the pictures and return it.

    Args:
        rows: of edits, with scores where they are judged.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    made = {(row["method"], row["case"]): row for row in rows}
    target = store.folder / "index.html"
    target.write_text(
        _page.substitute(
            title=html.escape(f"Pinpoint: {protocol.name}"),
            command=html.escape(command),
            summary=_summary(found, errors(rows)),
            heads="".join(f"<th>{html.escape(method)}</th>" for method in methods),
            cases="\n".join(
                _case(store, case, methods, made, protocol.scores) for case in protocol.cases
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
    rows: Mapping[tuple[str, str], Row],
    scores: Sequence[str],
) -> str:
    shown = [_picture(address(case.image, store.folder), "source")]
    if mask := _mask(store, case):
        shown.append(_picture(address(mask, store.folder), "mask"))
    cells = [
        f"<td>{''.join(shown)}<p>{html.escape(case.id)}</p><p>{html.escape(case.source_prompt)}</p><p>{html.escape(case.target_prompt)}</p></td>"
    ]
    for method in methods:
        row = rows.get((method, case.id))
        cells.append(f"<td>{_edit(store, row, scores) if row else ''}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _edit(store: Store, row: Row, scores: Sequence[str]) -> str:
    if row.get("error"):
        return f"<p class=error>{html.escape(row['error'])}</p>"
    picture = store.picture(row["method"], row["case"], row["key"])
    lines = [_picture(address(picture, store.folder), "edit")]
    for score in (*scores, "seconds"):
        value = row.get("scores", {}).get(score)
        if value is not None:
            factor, unit = scale(score)
            lines.append(f"<p>{html.escape(score)}: {value * factor:.4g} {unit}</p>")
    return "".join(lines)


def address(picture: Path, folder: Path) -> str:
    """A picture's address on a page of a folder."""
    try:
        return quote(Path(os.path.relpath(picture, folder)).as_posix())
    except ValueError:
        # Of another drive of Windows.
        return picture.absolute().as_uri()


def _picture(source: str, what: str) -> str:
    return f"<img src='{html.escape(source)}' alt={what} width=256 loading=lazy>"


def _mask(store: Store, case: Case) -> Path | None:
    """A file of the case's mask, written if need be."""
    try:
        mask = case.mask_at(opened(case.image).size) if case.mask else None
    except BadCase:
        return None
    if mask is None:
        return None
    file = store.mask(case.id)
    file.parent.mkdir(parents=True, exist_ok=True)
    mask.save(file)
    return file
