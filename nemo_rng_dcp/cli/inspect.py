"""``nemo-rng-dcp inspect``: the streams in a checkpoint, and what is wrong with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from nemo_rng_dcp.cli import findings
from nemo_rng_dcp.cli.findings import LOST, Entry, Finding
from nemo_rng_dcp.cli.heading import name_of, title
from nemo_rng_dcp.cli.reading.checkpoint import ranks_that_wrote
from nemo_rng_dcp.cli.reading.foreign import ForeignState, find_foreign
from nemo_rng_dcp.cli.reading.opening import open_checkpoint
from nemo_rng_dcp.cli.reading.table import Table, find_loaders
from nemo_rng_dcp.cli.terminal import MANY, aligned, numbered, paragraph, plural, within
from nemo_rng_dcp.position import UNKNOWN, Position

_OF_A_ROW = ("row", "taken_at", "seed", "ranked", "world_size", "resizes", "hash_seed")


class Inspection:
    """What ``inspect`` finds in a checkpoint; see ``main.Report``.

    Args:
        options: The checkpoint, and the least of the severities that make the exit code 1.

    Attributes:
        entries: What ``StatefulRNG`` stored.
        loaders: Where each ``ResumableLoader`` is, by key.
        others: RNG state that other code stored.
        findings: What is wrong.
        notes: What is worth knowing.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        checkpoint = open_checkpoint(options.checkpoint)
        self.where = checkpoint.where
        self.entries = [findings.examine(Table(checkpoint, key)) for key in checkpoint.records]
        loaders = find_loaders(checkpoint)
        self.loaders = {key: found for key, found in loaders.items() if not isinstance(found, str)}
        self.others = find_foreign(checkpoint)
        self.findings = [finding for entry in self.entries for finding in entry.findings]
        self.findings += findings.misfits(checkpoint)
        self.findings += findings.of_loaders(loaders)
        writers = ranks_that_wrote(checkpoint.files)
        verdicts = [state.verdict(writers) for state in self.others]
        self.notes = [note for notes, _ in verdicts for note in notes]
        if not (self.findings or self.entries or self.others):
            self.findings = [Finding(LOST, "no RNG state in it: a resume restores no stream")]
        elif not self.entries and any(lost for _, lost in verdicts):
            text = "no StatefulRNG's record, and other code's RNG state has lost streams: see notes"
            self.findings.append(Finding(LOST, text))
        failing = findings.SEVERITIES[: findings.SEVERITIES.index(options.fail_on) + 1]
        self.failed = any(finding.severity in failing for finding in self.findings)
        self.trouble = ""

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        return {
            "checkpoint": self.where,
            "entries": [_entry_json(entry, rows) for entry in self.entries],
            "loaders": [
                {"key": key, "rows": [at._asdict() for at in found]}
                for key, found in self.loaders.items()
            ],
            "others": [
                {"prefix": state.prefix, "ranks": sorted(state.ranks), "keys": list(state.contents)}
                for state in self.others
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
        }

    def lines(self, rows: Sequence[range] | None) -> list[str]:
        lines = [line for entry in self.entries for line in _entry_lines(entry, rows)]
        for key, positions in self.loaders.items():
            lines += [*_loader_lines(key, positions), ""]
        lines += [line for state in self.others for line in _foreign_lines(state)]
        lines += [line for note in self.notes for line in paragraph(f"note: {note}")]
        lines += [line for finding in self.findings for line in _finding_lines(finding)]
        return lines if self.findings else [*lines, "no findings"]


def _entry_json(entry: Entry, rows: Sequence[range] | None) -> dict[str, Any]:
    streams = [_row_json(entry, row) for row in entry.records if within(row, rows)]
    names = list(entry.fingerprints)
    return {"key": entry.key, "rows": entry.count, "generators": names, "streams": streams}


def _row_json(entry: Entry, row: int) -> dict[str, Any]:
    record = entry.records[row]
    return {
        **{name: getattr(record, name) for name in _OF_A_ROW},
        "mesh": None if record.mesh is None else dict(record.mesh),
        "versions": record.versions(),
        "fingerprints": {name: entry.fingerprints[name][row] for name in record.streams},
        "shared": [name for name, stream in record.streams.items() if stream.shared],
    }


def _entry_lines(entry: Entry, rows: Sequence[range] | None) -> list[str]:
    """Return who saved an entry, and a line for each row, all or those in ``rows``."""
    records = list(entry.records.values())
    lines = title(entry.key, entry.count, records[0] if records else None)
    if records:
        first = min(record.taken_at for record in records) / 10**9
        lines.append(f"  taken {datetime.fromtimestamp(first, timezone.utc):%Y-%m-%d %H:%M:%S} UTC")
    chosen = [row for row in entry.records if within(row, rows)]
    if rows is None and len(chosen) > MANY:
        for name, fingerprints in entry.fingerprints.items():
            different = f"{len(set(fingerprints.values())):,} different"
            lines.append(f"{name:<8} {plural(len(fingerprints), 'good row')}, {different}")
        lines += ["", "The first and the last rows (--rows 12,40-44 shows others):"]
        chosen = chosen[:3] + chosen[-3:]
    streams = entry.fingerprints.values()
    cells = [[str(row), *(found.get(row, "-") for found in streams)] for row in chosen]
    return [*lines, *aligned(["row", *entry.fingerprints], cells), ""]


def _loader_lines(key: str, positions: Sequence[Position]) -> list[str]:
    """Return where a loader is and what it says of itself."""
    at = positions[0]
    figures = {"length": at.loader_length, "samples": at.samples, "batch size": at.batch_size}
    told = [f"{name} {number:,}" for name, number in figures.items() if number != UNKNOWN]
    of_rows = f"a loader of {plural(at.rows, 'row')}"
    where = f"behind batch {at.batches:,} of epoch {at.epoch:,}"
    return paragraph(f"{name_of(key)}: {of_rows}, {where} ({', '.join(told) or 'a stream'})")


def _foreign_lines(state: ForeignState) -> list[str]:
    """Return what other code stored, a line for each key."""
    kind = f"{plural(len(state.ranks), 'rank')} in the keys" if state.ranks else "rank-less keys"
    lines = paragraph(f"{name_of(state.prefix)}: no StatefulRNG's; {kind}")
    cells = [["", n or "(the key itself)", str(stored)] for n, stored in state.contents.items()]
    return [*lines, *aligned(["", "key", "stored as"], cells, named_by=2), ""]


def _finding_lines(finding: Finding) -> list[str]:
    rows = numbered("row", finding.rows) if finding.rows else ""
    where = ", ".join(filter(None, [finding.key, finding.generator, rows]))
    text = ": ".join(filter(None, [finding.severity, where, finding.text]))
    return paragraph(text)
