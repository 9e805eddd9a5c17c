"""The tables that are printed: results and targets, one line each."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
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

    def lines(self) -> list[str]:
        """Return it with columns that line up."""
        heading = self.title, "StatefulRNG", self.beside, "found", "target", ""
        return _aligned([heading, *(row.cells() for row in self.rows)], left=(0, 5))


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

    def lines(self) -> list[str]:
        """Return it with columns that line up."""
        return _aligned([(self.title, *self.columns), *self.rows], left=(0,))


def text(seconds: Sequence[float] | float) -> str:
    """Return the median of seconds in a unit in which it is at least 1, with two or more digits."""
    value = seconds if isinstance(seconds, float) else statistics.median(seconds)
    unit, name = next((u for u in _UNITS if abs(value) >= u[0]), _UNITS[-1])
    number = value / unit
    return f"{number:.{0 if abs(number) >= 10 else 1}f} {name}"


def filled(page: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """Return a page whose text blocks hold other lines, those that begin with one of the titles."""

    def block(match: re.Match[str]) -> str:
        found = [lines for title, lines in blocks.items() if match[1].startswith(title)]
        return "\n".join(["```text", *found[0], "```"]) if found else match[0]

    return re.sub(r"^```text\n(.*?)\n```$", block, page, flags=re.DOTALL | re.MULTILINE)


def _aligned(rows: Sequence[tuple[str, ...]], left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
