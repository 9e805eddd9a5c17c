"""The table that is printed: results and targets, one line each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.bench.timing import Target

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        what: What was measured.
        ours: What it is with StatefulRNG.
        beside: What it is for what it is compared with, if it is.
        target: How the two compare, or ours with a limit of its own.
    """

    what: str
    ours: str
    beside: str = ""
    target: Target | None = None

    def cells(self) -> tuple[str, ...]:
        if self.target is None:
            return self.what, self.ours, self.beside, "", "", ""
        target = self.target
        return self.what, self.ours, self.beside, target.found, target.limit, target.verdict


@dataclass(frozen=True)
class Section:
    """Rows that are compared with the same thing.

    Attributes:
        title: What the rows have in common.
        beside: What the second column of numbers is for.
    """

    title: str
    beside: str
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """Several ways side by side.

    Attributes:
        title: What the ways have in common.
        columns: What is told of each.
        rows: The ways, each a name and a cell for each column.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def text(seconds: Sequence[float] | float) -> str:
    """Return the median of seconds in a unit in which it is at least 1, with two or more digits."""
    value = seconds if isinstance(seconds, float) else statistics.median(seconds)
    unit, name = next((u for u in _UNITS if abs(value) >= u[0]), _UNITS[-1])
    number = value / unit
    return f"{number:.{0 if abs(number) >= 10 else 1}f} {name}"


def lines(sections: Sequence[Section]) -> list[str]:
    """Return the sections under one another, with columns that line up."""
    rows: list[tuple[str, ...]] = []
    for section in sections:
        rows += [("",) * 6, (section.title, "StatefulRNG", section.beside, "found", "target", "")]
        rows += [row.cells() for row in section.rows]
    return _aligned(rows[1:], left=(0, 5))


def compared(comparison: Comparison) -> list[str]:
    """Return a comparison under an empty line, with columns that line up."""
    heading = (comparison.title, *comparison.columns)
    return ["", *_aligned([heading, *comparison.rows], left=(0,))]


def _aligned(rows: Sequence[tuple[str, ...]], left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
