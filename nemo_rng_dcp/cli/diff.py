"""``nemo-rng-dcp diff``: the streams that differ between two checkpoints, and by how much."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_rng_dcp.cli.heading import job_of, name_of
from nemo_rng_dcp.cli.reading.opening import open_tables
from nemo_rng_dcp.cli.reading.table import Table
from nemo_rng_dcp.cli.streams import distance
from nemo_rng_dcp.cli.terminal import MANY, aligned, paragraph, plural, within
from nemo_rng_dcp.generators import is_reserved
from nemo_rng_dcp.record import Record, fingerprint


class Diff:
    """How the streams of two checkpoints, A and B, differ; see ``main.Report``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._names = {"a": options.a, "b": options.b}
        self.comparisons = compare(open_tables(options.a), open_tables(options.b))
        self.failed = any(comparison.differences for comparison in self.comparisons)
        damaged = {side: sum(found.damaged[side] for found in self.comparisons) for side in "AB"}
        reasons = [f"{plural(damaged[side], 'row')} of {side}" for side in "AB" if damaged[side]]
        why = "missing or damaged, not compared; see inspect"
        self.trouble = f"{' and '.join(reasons)} {why}" if reasons else ""

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        return {**self._names, "entries": [found.to_json(rows) for found in self.comparisons]}

    def lines(self, rows: Sequence[range] | None) -> list[str]:
        return [line for found in self.comparisons for line in found.lines(rows)]


@dataclass(frozen=True)
class Difference:
    """A stream that A and B have in two states.

    Attributes:
        row: The row.
        generator: The generator.
        a, b: Its fingerprints, "-" where there is no such stream.
        distance: What B is, such as "2 words ahead" or "only in A".
    """

    row: int
    generator: str
    a: str
    b: str
    distance: str


@dataclass
class Comparison:
    """How one entry differs between two checkpoints, A and B.

    Attributes:
        key: The key of the entry.
        compared: Rows that at least one of them has, and that are damaged in neither.
        differences: The streams that differ, by row and in the order of the generators.
        remarks: What else is different; it makes no stream another one.
        damaged: By "A" and "B" how many rows are missing or damaged; they were not compared.
    """

    key: str
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=dict)

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        """Return what ``--json`` prints; of the differences only those in ``rows``."""
        return {**asdict(self), "differences": [asdict(found) for found in self._within(rows)]}

    def lines(self, rows: Sequence[range] | None) -> list[str]:
        """Return the text for a person; of the differences only those in ``rows``."""
        name = name_of(self.key)
        lines = [line for text in self.remarks for line in paragraph(f"{name}: {text}")]
        if not self.differences:
            compared = f"{plural(self.compared, 'row')} compared, no stream differs"
            return [*lines, f"{name}: {compared if self.compared else 'no row compared'}"]
        counts = Counter(found.generator for found in self.differences)
        differing = sorted({found.row for found in self.differences})
        lines += paragraph(
            f"{name}: {len(differing):,} of {plural(self.compared, 'row')} differ: "
            + ", ".join(f"{generator} in {count:,}" for generator, count in counts.items())
        )
        shown = self._within([range(differing[:MANY][-1] + 1)] if rows is None else rows)
        cells = [[str(d.row), d.generator, d.a, d.b, d.distance] for d in shown]
        lines += aligned(["row", "generator", "A", "B", "B is"], cells, named_by=2)
        if rows is None and len(differing) > MANY:
            lines.append(f"... and {plural(len(differing) - MANY, 'more row')}, which --rows shows")
        return lines

    def _within(self, rows: Sequence[range] | None) -> list[Difference]:
        return [found for found in self.differences if within(found.row, rows)]


def compare(a: Sequence[Table], b: Sequence[Table]) -> list[Comparison]:
    """Return a comparison for each entry that A or B has.

    If each has one alone, these are compared, whatever their keys.
    """
    if len(a) == len(b) == 1 and a[0].key != b[0].key:
        comparison = _compare(a[0].key, a[0], b[0])
        comparison.remarks.insert(0, f"key {name_of(a[0].key)} in A, {name_of(b[0].key)} in B")
        return [comparison]
    in_a, in_b = ({table.key: table for table in tables} for tables in (a, b))
    return [_compare(key, in_a.get(key), in_b.get(key)) for key in dict.fromkeys([*in_a, *in_b])]


def _compare(key: str, a: Table | None, b: Table | None) -> Comparison:
    found = Comparison(key)
    if a is None or b is None:
        found.remarks.append(f"only in {'B' if a is None else 'A'}")
    tables = {"A": a, "B": b}
    placed = {side: set(table.placed) if table else set() for side, table in tables.items()}
    found.damaged = {side: table.missing if table else 0 for side, table in tables.items()}
    first: Record | None = None
    for row in sorted(placed["A"] | placed["B"]):
        # None where there should be no such row.
        in_a, in_b = (t.read(row) if t and t.expects(row) else None for t in (a, b))
        for side, record in (("A", in_a), ("B", in_b)):
            found.damaged[side] += isinstance(record, str) and row in placed[side]
        # A damaged row is no difference: nobody knows what it was.
        if isinstance(in_a, str) or isinstance(in_b, str):
            continue
        if first is None and in_a is not None and in_b is not None:
            found.remarks += _remarks(in_a, in_b)
            first = in_a
        found.compared += 1
        found.differences += _differences(row, in_a, in_b)
    moved = {difference.generator for difference in found.differences}
    if first and len({difference.row for difference in found.differences}) == found.compared:
        found.remarks += [
            f"{name} did not move in any row, and other streams did: does the job draw from the "
            "object that it registered?"
            for name in first.streams
            if name not in moved and not is_reserved(name) and "." not in name
        ]
    return found


def _differences(row: int, a: Record | None, b: Record | None) -> list[Difference]:
    in_a, in_b = (dict(record.streams) if record else {} for record in (a, b))
    differences = []
    for name in dict.fromkeys([*in_a, *in_b]):
        first, second = in_a.get(name), in_b.get(name)
        if first is None or second is None or first[::2] != second[::2]:
            x, y = (fingerprint(stream.state) if stream else "-" for stream in (first, second))
            only = f"only in {'A' if first else 'B'}"
            far = distance(first, second) if first and second else only
            differences.append(Difference(row, name, x, y, far))
    return differences


def _remarks(a: Record, b: Record) -> list[str]:
    in_a, in_b = (
        {"rows": r.rows, **job_of(r), "PYTHONHASHSEED": r.hash_seed, **r.versions()} for r in (a, b)
    )
    return [f"{name} {x} in A, {in_b[name]} in B" for name, x in in_a.items() if x != in_b[name]]
