"""What is wrong with the records in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nemo_rng_dcp.cli.heading import job_of
from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.table import Table
from nemo_rng_dcp.cli.streams import is_at_seed, refusals
from nemo_rng_dcp.generators import is_reserved
from nemo_rng_dcp.keys import is_name, path_of
from nemo_rng_dcp.position import POSITION_KEY, Position
from nemo_rng_dcp.record import KEY, Record, Stream, fingerprint

SEVERITIES = DAMAGE, LOST, SUSPICIOUS = "damage", "lost", "suspicious"
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


@dataclass
class Entry:
    """The good rows of a table and what was found out about it.

    Attributes:
        key: The key of the entry, "" at the top level of the checkpoint.
        count: Rows, by what the checkpoint says.
        records: The good ones, by row, with empty states.
        fingerprints: By generator, in their order, and by row: 12 digits, as of
            ``StatefulRNG.fingerprint()``.
        at_seed: By generator the rows in which it is where the job's seed puts it.
        findings: What was found.
    """

    key: str
    count: int
    records: dict[int, Record] = field(default_factory=dict)
    fingerprints: dict[str, dict[int, str]] = field(default_factory=dict)
    at_seed: dict[str, list[int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, row: int, record: Record) -> None:
        """Take a good row in."""
        emptied = {name: Stream(s.kind, s.shared, b"") for name, s in record.streams.items()}
        self.records[row] = replace(record, streams=emptied)
        seed = -1 if record.seed is None else record.seed + (record.row if record.ranked else 0)
        for name, stream in record.streams.items():
            self.fingerprints.setdefault(name, {})[row] = fingerprint(stream.state)
            # Not every generator takes other seeds than these.
            if is_reserved(name) and 0 <= seed < 2**32 and is_at_seed(stream, seed):
                self.at_seed.setdefault(name, []).append(row)


def examine(table: Table) -> Entry:
    """Check every row of a table as a load would, and compare the rows with each other."""
    entry = Entry(table.key, table.count)
    damage: dict[tuple[str, str], list[int]] = {}
    for row in table.placed:
        record = table.read(row)
        if isinstance(record, str):
            reasons = {"": record}
        elif not (reasons := refusals(record)):
            entry.add(row, record)
        for found in reasons.items():
            damage.setdefault(found, []).append(row)
    for (name, reason), rows in damage.items():
        text = f"a load refuses it, though its check word fits: {reason}" if name else reason
        entry.findings.append(Finding(DAMAGE, text, entry.key, name, tuple(rows)))
    if table.missing:
        first = next((n for n, row in enumerate(table.placed) if n != row), len(table.placed))
        text = f"{table.missing} of {table.count} rows are missing, the first is {first}"
        entry.findings.append(Finding(DAMAGE, text, entry.key))
    entry.findings += [*_disagreements(entry), *_alike(entry)]
    text = "still at its seed: nothing was drawn from it, or it was seeded again"
    for name, at_seed in entry.at_seed.items():
        entry.findings.append(Finding(SUSPICIOUS, text, entry.key, name, tuple(at_seed)))
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


def _disagreements(entry: Entry) -> Iterator[Finding]:
    """Find rows that were not written by the job that wrote the first one."""
    groups: dict[object, list[int]] = {}  # mostly one, so what a person reads is made once
    for row, r in entry.records.items():
        job = r.world_size, r.seed, r.ranked, r.resizes, r.mesh, *r.versions().values(), *r.streams
        groups.setdefault(job, []).append(row)
    claims = [(rows, _claims(entry.records[rows[0]])) for rows in groups.values()]
    for (severity, name), expected in claims[0][1].items() if claims else ():
        if differ := [rows for rows, found in claims if found[severity, name] != expected]:
            text = f"another {name} than row {claims[0][0][0]}'s {expected}"
            others = tuple(sorted(row for rows in differ for row in rows))
            yield Finding(severity, text, entry.key, "", others)


def _claims(record: Record) -> dict[tuple[str, str], str]:
    """Return what all rows should say alike, by how bad it is if they do not, and by its name."""
    return {
        **{(DAMAGE, name): text for name, text in job_of(record).items()},
        **{(SUSPICIOUS, f"{name} version"): text for name, text in record.versions().items()},
        (SUSPICIOUS, "set of generators"): ", ".join(sorted(record.streams)),
    }


def _alike(entry: Entry) -> Iterator[Finding]:
    """Find rows that hold one stream where each should have its own, and the other way round."""
    for name, fingerprints in entry.fingerprints.items():
        holders: dict[str, list[int]] = {}
        for row, digits in fingerprints.items():
            holders.setdefault(digits, []).append(row)
        first = entry.records[next(iter(fingerprints))]
        if first.streams[name].shared:
            most = max(holders.values(), key=len)
            if others := sorted(fingerprints.keys() - most):
                text = f"shared, but these rows have another stream than row {most[0]}"
                yield Finding(SUSPICIOUS, text, entry.key, name, tuple(others))
        elif first.ranked or not is_reserved(name):
            for digits, rows in holders.items():
                if len(rows) > 1:
                    text = f"these rows have one stream ({digits}), and each should have its own"
                    yield Finding(SUSPICIOUS, text, entry.key, name, tuple(rows))
