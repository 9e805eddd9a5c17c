"""``nemo-rng-dcp inspect``: the streams in a checkpoint, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from nemo_rng_dcp.cli.checkpoint.checkpoint import Checkpoint, ranks_that_wrote
from nemo_rng_dcp.cli.checkpoint.table import find_tables
from nemo_rng_dcp.cli.findings import LOST, Entry, Finding, examine, misfits
from nemo_rng_dcp.cli.frameworks.foreign import ForeignState, find_foreign
from nemo_rng_dcp.cli.heading import name_of, title
from nemo_rng_dcp.cli.terminal import (
    MANY,
    Style,
    paragraph,
    plural,
    short_spans,
    table,
    within,
)
from nemo_rng_dcp.record import Record


class Inspection:
    """What ``inspect`` finds in a checkpoint.

    Args:
        checkpoint: The checkpoint.

    Attributes:
        entries: What ``StatefulRNG`` stored.
        others: RNG state that other code stored.
        findings: What is wrong.
        notes: What is worth knowing.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.where = checkpoint.where
        self.entries = [examine(each) for each in find_tables(checkpoint)]
        self.others = find_foreign(checkpoint)
        self.findings = [finding for entry in self.entries for finding in entry.findings]
        self.findings += misfits(checkpoint)
        writers = ranks_that_wrote(checkpoint.files)
        self.notes = [note for state in self.others for note in state.notes(writers)]
        if not (self.findings or self.entries or self.others):
            text = "no RNG state in it: a resume restores no stream"
            self.findings.append(Finding(LOST, "", "", (), text))
        elif not self.entries and any(state.lost(writers) for state in self.others):
            text = "no StatefulRNG's record, and other code's RNG state has lost streams: see notes"
            self.findings.append(Finding(LOST, "", "", (), text))

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        """Return what ``--json`` prints; of the streams only those of ``rows``."""
        return {
            "checkpoint": self.where,
            "entries": [_entry_json(entry, rows) for entry in self.entries],
            "others": [
                {"path": state.path, "ranks": sorted(state.ranks), "keys": list(state.contents)}
                for state in self.others
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
        }

    def lines(self, rows: Sequence[range] | None, style: Style) -> list[str]:
        """Return the text for a person; of the streams only those of ``rows``."""
        lines = [line for entry in self.entries for line in _entry_lines(entry, rows, style)]
        lines += [line for state in self.others for line in _foreign_lines(state, style)]
        lines += [line for note in self.notes for line in paragraph(f"note: {note}", 2)]
        lines += [line for found in self.findings for line in _finding_lines(found, style)]
        return lines if self.findings else [*lines, style("no findings", "green")]


def _entry_lines(entry: Entry, rows: Sequence[range] | None, style: Style) -> list[str]:
    """Return who saved an entry, and a line for each row, all or those in ``rows``."""
    records = [row.record for row in entry.rows.values()]
    lines = title(entry.path, entry.count, records[0] if records else None, style)
    if records:
        lines.append(f"  taken {_taken(records)}")
    chosen = [number for number in entry.rows if within(number, rows)]
    if rows is None and len(chosen) > MANY:
        for name in entry.generators:
            found = [row.digests[name] for row in entry.rows.values() if name in row.digests]
            good = plural(len(found), "good row")
            lines.append(f"{name:<8} {good}, {len(set(found)):,} different")
        lines += ["", "The first and the last rows (--rows 12,40-44 shows others):"]
        chosen = chosen[:3] + chosen[-3:]
    cells = [
        [str(n), *(entry.rows[n].digests.get(name, "-") for name in entry.generators)]
        for n in chosen
    ]
    return [*lines, *table(["row", *entry.generators], cells, style), ""]


def _taken(records: Sequence[Record]) -> str:
    """Return when the streams were taken, on the clocks of the ranks."""
    first = min(record.taken_at for record in records)
    last = max(record.taken_at for record in records)
    spread = f", the last row {(last - first) / 1e9:.1f} s later" if last - first > 10**8 else ""
    return f"{_time(first)}{spread}"


def _time(nanoseconds: int) -> str:
    # The head may hold any number; the clock's range is smaller.
    if not 0 <= nanoseconds < 2**62:
        return f"{nanoseconds} ns since 1970"
    moment = datetime.fromtimestamp(nanoseconds // 10**9, timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _foreign_lines(state: ForeignState, style: Style) -> list[str]:
    """Return what other code stored, a line for each key."""
    kind = f"{plural(len(state.ranks), 'rank')} in the keys" if state.ranks else "rank-less keys"
    lines = paragraph(f"{style(name_of(state.path), 'bold')}: no StatefulRNG's; {kind}", 2)
    cells = []
    for name, stored in state.contents.items():
        what = "a pickle" if stored.dtype is None else f"{stored.dtype} {list(stored.size)}"
        writer = f"written by rank {state.writers[name]}" if name in state.writers else ""
        cells.append(["", name or "(the key itself)", what, writer])
    return [*lines, *table(["", "key", "stored as", ""], cells, style), ""]


def _finding_lines(finding: Finding, style: Style) -> list[str]:
    where = [finding.path] * bool(finding.path) + [finding.generator] * bool(finding.generator)
    if finding.rows:
        row = "row" if len(finding.rows) == 1 else "rows"
        where.append(f"{row} {short_spans(finding.rows)}")
    text = ": ".join([finding.severity, *([", ".join(where)] if where else []), finding.text])
    first, *rest = paragraph(text, 2)
    colour = "yellow" if finding.severity == "suspicious" else "red"
    return [first.replace(finding.severity, style(finding.severity, colour), 1), *rest]


def _entry_json(entry: Entry, rows: Sequence[range] | None) -> dict[str, Any]:
    return {
        "path": entry.path,
        "rows": entry.count,
        "generators": entry.generators,
        "streams": [
            {
                "row": number,
                "taken_at": row.record.taken_at,
                "seed": row.record.seed,
                "ranked": row.record.ranked,
                "world_size": row.record.world_size,
                "resizes": row.record.resizes,
                "mesh": None if row.record.mesh is None else dict(row.record.mesh),
                "versions": row.record.versions(),
                "hash_seed": row.record.hash_seed,
                "digests": row.digests,
                "shared": [name for name, its in row.record.streams.items() if its.shared],
            }
            for number, row in entry.rows.items()
            if within(number, rows)
        ],
    }
