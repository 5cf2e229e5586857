"""Tables for the terminal and for documents.

May import: nothing of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a document."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class NamedTable(NamedTuple):
    """A table for the terminal or a document."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
