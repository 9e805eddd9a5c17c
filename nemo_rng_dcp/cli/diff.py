"""``nemo-rng-dcp diff``: the streams that differ between two checkpoints, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nemo_rng_dcp.cli.checkpoint.table import Table
from nemo_rng_dcp.cli.distance import distance
from nemo_rng_dcp.cli.heading import name_of
from nemo_rng_dcp.cli.terminal import MANY, Style, paragraph, plural, table, within
from nemo_rng_dcp.record import Record, Stream, fingerprint, mesh_text


class Difference(NamedTuple):
    """A stream that A and B have in two states.

    Attributes:
        row: The row.
        generator: The generator.
        a, b: Its digests, "-" where there is no such stream.
        distance: What B is, such as "2 words ahead", where that can be told.
    """

    row: int
    generator: str
    a: str
    b: str
    distance: str | None


@dataclass
class Comparison:
    """How one entry differs between two checkpoints, A and B.

    Attributes:
        path: The dotted path of the entry.
        compared: Rows that at least one of them has, and that are damaged in neither.
        differences: The streams that differ, by row and in the order of the generators.
        remarks: What else is different; it makes no stream another one.
        damaged: By "A" and "B" how many rows are missing or damaged; they were not compared.
        one_rank_a_row: Whether the number of a row is the rank that has it.
    """

    path: str
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=lambda: {"A": 0, "B": 0})
    one_rank_a_row: bool = True

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        """Return what ``--json`` prints; of the differences only those in ``rows``."""
        return {
            "path": self.path,
            "compared": self.compared,
            "differences": [each._asdict() for each in self.differences if within(each.row, rows)],
            "remarks": self.remarks,
            "damaged": self.damaged,
        }

    def lines(self, rows: Sequence[range] | None, style: Style) -> list[str]:
        """Return the text for a person; of the differences only those in ``rows``."""
        name = name_of(self.path)
        lines = [line for text in self.remarks for line in paragraph(f"{name}: {text}", 2)]
        if not self.differences:
            what = f"{plural(self.compared, 'row')} compared, no stream differs"
            return [*lines, f"{name}: {what if self.compared else 'no row compared'}"]
        generators = list(dict.fromkeys(each.generator for each in self.differences))
        counts = {g: sum(each.generator == g for each in self.differences) for g in generators}
        differing = len({each.row for each in self.differences})
        lines += paragraph(
            f"{name}: {differing:,} of {plural(self.compared, 'row')} differ: "
            + ", ".join(f"{generator} in {count:,}" for generator, count in counts.items()),
            2,
        )
        lines += paragraph(f"the first: {self._said(self.differences[0])}", 2)
        chosen = [each for each in self.differences if within(each.row, rows)]
        shown = sorted({each.row for each in chosen})
        if rows is None:
            shown = shown[:MANY]
            chosen = [each for each in chosen if each.row <= shown[-1]]
        cells = [[str(d.row), d.generator, d.a, d.b, d.distance or ""] for d in chosen]
        lines += table(["row", "generator", "A", "B", "B is"], cells, style)
        if differing > len(shown) and rows is None:
            lines.append(f"... and {plural(differing - MANY, 'more row')}, which --rows shows")
        return lines

    def _said(self, difference: Difference) -> str:
        row = "rank" if self.one_rank_a_row else "row"
        if "-" in (difference.a, difference.b):
            how = f"only in {'B' if difference.a == '-' else 'A'}"
        elif difference.distance:
            how = f"B is {difference.distance}"
        else:
            how = "another stream, or far off"
        return f"{row} {difference.row} {difference.generator}: {how}"


def compare(a: Sequence[Table], b: Sequence[Table]) -> list[Comparison]:
    """Return a comparison for each entry that A or B has.

    If each has one alone, these are compared, whatever their paths.
    """
    if len(a) == len(b) == 1 and a[0].path != b[0].path:
        found = _compare(a[0].path, a[0], b[0])
        paths = [name_of(each[0].path) for each in (a, b)]
        found.remarks.insert(0, f"path {paths[0]} in A, {paths[1]} in B")
        return [found]
    in_a, in_b = ({each.path: each for each in tables} for tables in (a, b))
    return [
        _compare(path, in_a.get(path), in_b.get(path)) for path in dict.fromkeys([*in_a, *in_b])
    ]


def _compare(path: str, a: Table | None, b: Table | None) -> Comparison:
    found = Comparison(path)
    if a is None or b is None:
        found.remarks.append(f"only in {'B' if a is None else 'A'}")
    tables = {"A": a, "B": b}
    placed = {side: set(its.placed) if its else set() for side, its in tables.items()}
    for side, its in tables.items():
        found.damaged[side] += its.missing if its else 0
    first = True
    for row in sorted(placed["A"] | placed["B"]):
        in_a, in_b = (_read(its, row, row in placed[side]) for side, its in tables.items())
        for side, record in (("A", in_a), ("B", in_b)):
            found.damaged[side] += isinstance(record, str) and row in placed[side]
        # A damaged row is no difference: nobody knows what it was.
        if isinstance(in_a, str) or isinstance(in_b, str):
            continue
        if first and in_a is not None and in_b is not None:
            found.remarks += _remarks(in_a, in_b)
            found.one_rank_a_row = in_a.mesh is None and in_b.mesh is None
            first = False
        found.compared += 1
        found.differences += _differences(row, in_a, in_b)
    return found


def _read(table: Table | None, row: int, placed: bool) -> Record | str | None:
    """Return a row; a text if it is damaged or missing, ``None`` if there should be none."""
    if table is None or (row >= table.count and not placed):
        return None
    return table.read(row)


def _differences(row: int, a: Record | None, b: Record | None) -> list[Difference]:
    in_a, in_b = (dict(record.streams) if record else {} for record in (a, b))
    differences = []
    for name in dict.fromkeys([*in_a, *in_b]):
        first, second = in_a.get(name), in_b.get(name)
        if first is None or second is None or first[::2] != second[::2]:
            far = distance(first, second) if first and second else None
            differences.append(Difference(row, name, _digest(first), _digest(second), far))
    return differences


def _digest(stream: Stream | None) -> str:
    return "-" if stream is None else fingerprint(stream.state)


def _remarks(a: Record, b: Record) -> list[str]:
    pairs = {
        "rows": (a.rows, b.rows),
        "world size": (a.world_size, b.world_size),
        "seed": (a.seed, b.seed),
        "ranked": (a.ranked, b.ranked),
        "resizes": (a.resizes, b.resizes),
        "mesh": (mesh_text(a.mesh), mesh_text(b.mesh)),
        "PYTHONHASHSEED": (a.hash_seed, b.hash_seed),
    }
    in_b = b.versions()
    pairs |= {name: (version, in_b[name]) for name, version in a.versions().items()}
    return [f"{name} {x} in A, {y} in B" for name, (x, y) in pairs.items() if x != y]
