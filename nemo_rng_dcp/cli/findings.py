"""What is wrong with the records in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_rng_dcp.cli.checkpoint.checkpoint import Checkpoint, is_record
from nemo_rng_dcp.cli.checkpoint.table import Table
from nemo_rng_dcp.cli.trial_generators import packed_after_seed, refusals
from nemo_rng_dcp.generators import is_reserved
from nemo_rng_dcp.grids import is_name, path_of
from nemo_rng_dcp.record import KEY, Record, Stream, fingerprint, mesh_text
from nemo_rng_dcp.versions import version_text

DAMAGE, LOST, SUSPICIOUS = "damage", "lost", "suspicious"
SEVERITIES = (DAMAGE, LOST, SUSPICIOUS)
"""From the worst: a load raises or mixes jobs; streams are in no checkpoint; it may be meant so."""

_OF_THE_JOB = ("world_size", "seed", "ranked", "resizes", "mesh")
_OF_THE_MACHINE = ("python_version", "numpy_version", "torch_version", "library_version")


@dataclass(frozen=True)
class Finding:
    """Something that a person should look at.

    Attributes:
        severity: One of :data:`SEVERITIES`.
        path: The RNG entry, "" at the top level of the checkpoint.
        generator: Empty where it is about all of them.
        rows: Empty where it is about all of them.
        text: What was found.
    """

    severity: str
    path: str
    generator: str
    rows: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Row:
    """A good row.

    Attributes:
        record: The record, with empty states.
        digests: By generator: 12 digits, as of ``StatefulRNG.fingerprint()``.
        at_seed: The generators that are where the job's seed puts them.
    """

    record: Record
    digests: dict[str, str]
    at_seed: frozenset[str]


@dataclass
class Entry:
    """The good rows of a table and what was found out about it.

    Attributes:
        path: The dotted path of the entry, "" at the top level of the checkpoint.
        count: Rows, by what the checkpoint says.
        rows: The good ones, by number.
        findings: What was found.
    """

    path: str
    count: int
    rows: dict[int, Row] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def generators(self) -> list[str]:
        """The generators that at least one row has, in their order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row.digests))


def examine(table: Table) -> Entry:
    """Check every row of a table as a load would, and compare the rows with each other."""
    entry = Entry(table.path, table.count)
    damage: dict[tuple[str, str], list[int]] = {}
    for number in table.placed:
        record = table.read(number)
        if isinstance(record, str):
            damage.setdefault(("", record), []).append(number)
            continue
        refused = refusals(record)
        for name, reason in refused.items():
            text = f"a load refuses it, though its check word fits: {reason}"
            damage.setdefault((name, text), []).append(number)
        if not refused:
            entry.rows[number] = _row(record)
    for (name, text), rows in damage.items():
        entry.findings.append(Finding(DAMAGE, entry.path, name, tuple(rows), text))
    if table.missing:
        first = next((n for n, row in enumerate(table.placed) if n != row), len(table.placed))
        text = f"{table.missing} of {table.count} rows are missing, the first is {first}"
        entry.findings.append(Finding(DAMAGE, entry.path, "", (), text))
    entry.findings += [*_disagreements(entry), *_alike(entry), *_at_their_seed(entry)]
    return entry


def misfits(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find what has a record's name and cannot be one."""
    for key, stored in sorted(checkpoint.keys.items()):
        if is_name(key.rpartition(".")[2]) and not is_record(key, stored):
            its = "a pickle" if stored.dtype is None else f"{stored.dtype} {list(stored.size)}"
            text = f"{KEY} is {its}, expected int64 of one dimension: a load finds no record in it"
            yield Finding(DAMAGE, path_of(key), "", (), text)


def _row(record: Record) -> Row:
    states = {name: stream.state for name, stream in record.streams.items()}
    seed = record.seed + (record.row if record.ranked else 0)
    at_seed = frozenset(
        name
        for name, kind in (("python", "python"), ("numpy", "numpy"), ("torch", "torch.cpu"))
        if name in states and 0 <= seed < 2**32 and states[name] == packed_after_seed(kind, seed)
    )
    emptied = {name: Stream(its.kind, its.shared, b"") for name, its in record.streams.items()}
    digests = {name: fingerprint(state) for name, state in states.items()}
    return Row(replace(record, streams=emptied), digests, at_seed)


def _disagreements(entry: Entry) -> Iterator[Finding]:
    """Find rows that were not written by the job that wrote the first one."""
    if not entry.rows:
        return
    number, first = next(iter(entry.rows.items()))
    for severity, names in ((DAMAGE, _OF_THE_JOB), (SUSPICIOUS, _OF_THE_MACHINE)):
        for name in names:
            expected = getattr(first.record, name)
            rows = tuple(n for n, r in entry.rows.items() if getattr(r.record, name) != expected)
            if rows:
                said = _said(name, expected)
                text = f"another {name.replace('_', ' ')} than row {number}'s {said}"
                yield Finding(severity, entry.path, "", rows, text)
    rows = tuple(n for n, r in entry.rows.items() if r.digests.keys() != first.digests.keys())
    if rows:
        text = f"other generators than row {number}'s {', '.join(first.digests)}"
        yield Finding(SUSPICIOUS, entry.path, "", rows, text)


def _said(name: str, value: Any) -> str:
    """Return a field of a record as a person reads it."""
    if name == "mesh":
        return mesh_text(value)
    return version_text(value) if name in _OF_THE_MACHINE else str(value)


def _alike(entry: Entry) -> Iterator[Finding]:
    """Find rows that hold one stream where each should have its own, and the other way round."""
    for name in entry.generators:
        rows = {n: row for n, row in entry.rows.items() if name in row.digests}
        holders: dict[str, list[int]] = {}
        for number, row in rows.items():
            holders.setdefault(row.digests[name], []).append(number)
        first = next(iter(rows.values())).record
        if first.streams[name].shared:
            if len(holders) > 1:
                most = max(holders.values(), key=len)
                others = tuple(number for number in rows if number not in set(most))
                text = f"shared, but these rows have another stream than row {most[0]}"
                yield Finding(SUSPICIOUS, entry.path, name, others, text)
            continue
        for digits, alike in holders.items():
            if len(alike) > 1 and (first.ranked or not is_reserved(name)):
                text = f"these rows have one stream ({digits}), and each should have its own"
                yield Finding(SUSPICIOUS, entry.path, name, tuple(alike), text)


def _at_their_seed(entry: Entry) -> Iterator[Finding]:
    """Find streams from which nothing was drawn since the job was seeded."""
    for name in entry.generators:
        rows = tuple(number for number, row in entry.rows.items() if name in row.at_seed)
        if rows:
            text = "still at its seed: nothing was drawn from it, or it was seeded again"
            yield Finding(SUSPICIOUS, entry.path, name, rows, text)
