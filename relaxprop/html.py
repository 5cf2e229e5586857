"""Tables of records as HTML, for notebooks.

May import: nothing of this project.
"""

from __future__ import annotations

import html
from collections.abc import Sequence


def table(rows: Sequence[Sequence[object]], titles: Sequence[str] = ()) -> str:
    """A table. A cell that is a tuple has a line for each entry."""
    lines = ["<table>"]
    if titles:
        lines.append(f"<thead><tr>{''.join(f'<th>{html.escape(title)}</th>' for title in titles)}</tr></thead>")
    cells = (f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return "\n".join([*lines, "<tbody>", *cells, "</tbody>", "</table>"])


def _cell(value: object) -> str:
    entries = value if isinstance(value, tuple) else (value,)
    return "<br>".join(html.escape(str(entry)) for entry in entries)
