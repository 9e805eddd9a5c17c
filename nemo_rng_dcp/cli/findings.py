"""What is wrong with the records in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nemo_rng_dcp.cli.heading import job_of
from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.table import Table
from nemo_rng_dcp.cli.streams import fingerprints, packed_after_seed, refusals
from nemo_rng_dcp.generators import is_reserved
from nemo_rng_dcp.keys import is_name, path_of
from nemo_rng_dcp.position import POSITION_KEY, Position
from nemo_rng_dcp.record import KEY, Record

DAMAGE, LOST, SUSPICIOUS = "damage", "lost", "suspicious"
SEVERITIES = (DAMAGE, LOST, SUSPICIOUS)
"""From the worst: a load raises or mixes jobs; streams are in no checkpoint; it may be meant so."""


@dataclass(frozen=True)
class Finding:
    """Something that a person should look at.

    Attributes:
        severity: One of :data:`SEVERITIES`.
        text: What was found.
        key: The RNG entry, "" at the top level of the checkpoint.
        generator: Empty where it is about all of them.
        rows: Empty where it is about all of them.
    """

    severity: str
    text: str
    key: str = ""
    generator: str = ""
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """A good row.

    Attributes:
        record: The record, with empty states.
        fingerprints: By generator: 12 digits, as of ``StatefulRNG.fingerprint()``.
        at_seed: The generators that are where the job's seed puts them.
    """

    record: Record
    fingerprints: dict[str, str]
    at_seed: frozenset[str]


@dataclass
class Entry:
    """The good rows of a table and what was found out about it.

    Attributes:
        key: The key of the entry, "" at the top level of the checkpoint.
        count: Rows, by what the checkpoint says.
        rows: The good ones, by number.
        findings: What was found.
    """

    key: str
    count: int
    rows: dict[int, Row] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def generators(self) -> list[str]:
        """The generators that at least one row has, in their order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row.fingerprints))

    def fingerprints(self, name: str) -> dict[int, str]:
        """Return a generator's fingerprints, by row."""
        rows = self.rows.items()
        return {n: row.fingerprints[name] for n, row in rows if name in row.fingerprints}


def examine(table: Table) -> Entry:
    """Check every row of a table as a load would, and compare the rows with each other."""
    entry = Entry(table.key, table.count)
    damage: dict[tuple[str, str], list[int]] = {}
    for number in table.placed:
        record = table.read(number)
        if isinstance(record, str):
            reasons = {"": record}
        else:
            why = "a load refuses it, though its check word fits"
            reasons = {name: f"{why}: {reason}" for name, reason in refusals(record).items()}
            if not reasons:
                entry.rows[number] = _row(record)
        for name, text in reasons.items():
            damage.setdefault((name, text), []).append(number)
    for (name, text), rows in damage.items():
        entry.findings.append(Finding(DAMAGE, text, entry.key, name, tuple(rows)))
    if table.missing:
        first = next((n for n, row in enumerate(table.placed) if n != row), len(table.placed))
        text = f"{table.missing} of {table.count} rows are missing, the first is {first}"
        entry.findings.append(Finding(DAMAGE, text, entry.key))
    entry.findings += [*_disagreements(entry), *_alike(entry), *_at_their_seed(entry)]
    return entry


def misfits(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find what has a record's name and cannot be one."""
    for key, stored in sorted(checkpoint.keys.items()):
        if is_name(key.rpartition(".")[2]) and not stored.is_record(key):
            text = f"{KEY} is {stored}, expected int64 of one dimension"
            yield Finding(DAMAGE, f"{text}: a load finds no record in it", path_of(key))


def of_loaders(loaders: Mapping[str, Sequence[Position] | str]) -> Iterator[Finding]:
    """Find what is wrong with the positions of loaders."""
    for key, found in loaders.items():
        if isinstance(found, str):
            yield Finding(DAMAGE, f"{POSITION_KEY}: {found}", key)
        elif len({(at.epoch, at.begun_again, at.fetched) for at in found}) > 1:
            text = "rows are at different batches: a save in which ranks were not at one step"
            yield Finding(SUSPICIOUS, text, key)


def _row(record: Record) -> Row:
    # Other seeds than these are not what every generator takes.
    seed = -1 if record.seed is None else record.seed + (record.row if record.ranked else 0)
    streams = record.streams.items() if 0 <= seed < 2**32 else ()
    at_seed = [
        name
        for name, stream in streams
        if is_reserved(name) and stream.state == packed_after_seed(stream.kind, seed)
    ]
    emptied = {name: stream._replace(state=b"") for name, stream in record.streams.items()}
    return Row(replace(record, streams=emptied), fingerprints(record), frozenset(at_seed))


def _disagreements(entry: Entry) -> Iterator[Finding]:
    """Find rows that were not written by the job that wrote the first one."""
    if not entry.rows:
        return
    number, first = next(iter(entry.rows.items()))
    claims = {n: _claims(row.record) for n, row in entry.rows.items()}
    for (severity, name), expected in claims[number].items():
        rows = tuple(n for n, found in claims.items() if found[severity, name] != expected)
        if rows:
            text = f"another {name} than row {number}'s {expected}"
            yield Finding(severity, text, entry.key, "", rows)
    names = first.fingerprints
    rows = tuple(n for n, row in entry.rows.items() if row.fingerprints.keys() != names.keys())
    if rows:
        text = f"other generators than row {number}'s {', '.join(names)}"
        yield Finding(SUSPICIOUS, text, entry.key, "", rows)


def _claims(record: Record) -> dict[tuple[str, str], str]:
    """Return what all rows should say alike, by how bad it is if they do not, and by its name."""
    return {
        **{(DAMAGE, name): text for name, text in job_of(record).items()},
        **{(SUSPICIOUS, f"{name} version"): text for name, text in record.versions().items()},
    }


def _alike(entry: Entry) -> Iterator[Finding]:
    """Find rows that hold one stream where each should have its own, and the other way round."""
    for name in entry.generators:
        holders: dict[str, list[int]] = {}
        for number, digits in entry.fingerprints(name).items():
            holders.setdefault(digits, []).append(number)
        first = entry.rows[next(iter(holders.values()))[0]].record
        if first.streams[name].shared:
            most = max(holders.values(), key=len)
            if len(holders) > 1:
                others = sorted(n for rows in holders.values() if rows is not most for n in rows)
                text = f"shared, but these rows have another stream than row {most[0]}"
                yield Finding(SUSPICIOUS, text, entry.key, name, tuple(others))
            continue
        for digits, rows in holders.items():
            if len(rows) > 1 and (first.ranked or not is_reserved(name)):
                text = f"these rows have one stream ({digits}), and each should have its own"
                yield Finding(SUSPICIOUS, text, entry.key, name, tuple(rows))


def _at_their_seed(entry: Entry) -> Iterator[Finding]:
    """Find streams from which nothing was drawn since the job was seeded."""
    for name in entry.generators:
        rows = tuple(number for number, row in entry.rows.items() if name in row.at_seed)
        if rows:
            text = "still at its seed: nothing was drawn from it, or it was seeded again"
            yield Finding(SUSPICIOUS, text, entry.key, name, rows)
