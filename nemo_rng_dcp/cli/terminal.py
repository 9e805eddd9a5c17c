"""Text for a terminal of 80 columns, or for a file: columns, paragraphs, spans."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
MANY = 40
"""More rows than these are summarised."""


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], named_by: int = 1) -> list[str]:
    """Return rows in columns below a header, a line each; the first column is a number.

    Columns that do not fit go on below, each time beside the ``named_by`` first ones.
    """
    columns: list[list[str]] = []
    for cells in zip(header, *rows, strict=True):
        width = max(map(len, cells))
        columns.append([c.ljust(width) if columns else c.rjust(width) for c in cells])
    tables = [columns[:named_by]]
    for column in columns[named_by:]:
        width = sum(len(filled[0]) + 2 for filled in tables[-1]) + len(column[0])
        if width > WIDTH and len(tables[-1]) > named_by:
            tables.append(columns[:named_by])
        tables[-1].append(column)
    return ["  ".join(line).rstrip() for table in tables for line in zip(*table, strict=True)]


def paragraph(text: str, hanging: int = 2) -> list[str]:
    """Return text in lines of 80 characters, all but the first indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * hanging, break_on_hyphens=False)


def spans(numbers: Iterable[int]) -> str:
    """Return "0-2, 5" for 0, 1, 2 and 5."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return "row 3", or "rows 0-2, 5", cut after the first few spans if there are many."""
    parts = spans(numbers).split(", ")
    if len(parts) > 6:
        parts = [*parts[:5], f"... ({len(numbers)} in all)"]
    return f"{noun}{'' if len(numbers) == 1 else 's'} {', '.join(parts)}"


def visible(text: str) -> str:
    """Return text that a terminal shows and does not obey: control codes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def within(row: int, rows: Sequence[range] | None) -> bool:
    """Return whether a row was asked for: ``None`` asks for all."""
    return rows is None or any(row in span for span in rows)
