"""``nemo-rng-dcp explain``: what a resume would do to each stream, without running it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_rng_dcp.cli.heading import name_of, title
from nemo_rng_dcp.cli.job import OF_ONE_ENTRY, Resuming
from nemo_rng_dcp.cli.reading.opening import open_tables
from nemo_rng_dcp.cli.reading.table import Table
from nemo_rng_dcp.cli.streams import packed_after_seed, refusals
from nemo_rng_dcp.cli.terminal import MANY, aligned, numbered, paragraph, plural, spans, within
from nemo_rng_dcp.record import Record, fingerprint
from nemo_rng_dcp.resume import Resume, resume

CONTINUED, COPIED, FORKED = "continued", "copied", "forked"
DROPPED, REFUSED = "dropped", "refused"


class Explanation:
    """What becomes of each RNG entry; see ``main.Report``.

    Args:
        options: The checkpoint and the job that resumes, as ``arguments`` describes them.

    Raises:
        ValueError: The job cannot exist.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._where = options.checkpoint
        tables = {table.key: table for table in open_tables(self._where)}
        names = ", ".join(map(name_of, tables))
        if options.entry is not None:
            if options.entry not in tables:
                raise ValueError(f"--entry {options.entry}: the checkpoint has only {names}")
            tables = {options.entry: tables[options.entry]}
        given = [name for name in OF_ONE_ENTRY if getattr(options, name) is not None]
        if len(tables) > 1 and given:
            option = f"--{given[0].replace('_', '-')}"
            why = f"is about one entry, and the checkpoint has {names}: give --entry too"
            raise ValueError(f"{option} {why}")
        self.entries = [Resumed(table, options) for table in tables.values()]
        self.failed = any(entry.refusals for entry in self.entries)
        self.trouble = ""

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        return {"checkpoint": self._where, "entries": [e.to_json(rows) for e in self.entries]}

    def lines(self, rows: Sequence[range] | None) -> list[str]:
        return [line for entry in self.entries for line in entry.lines(rows)]


@dataclass(frozen=True)
class Fate:
    """What becomes of one row's streams.

    Attributes:
        row: The row of the resumed job; of the checkpoint if it is dropped.
        ranks: The ranks of the resumed job that have this row.
        fate: ``continued``; of a new row ``copied`` (all its streams are another row's) or
            ``forked`` (some start anew); ``dropped``; or ``refused`` where a load raises.
        source: The saved row that it is made from.
        forked: The generators that start a new stream.
        fingerprints: By generator what ``StatefulRNG.fingerprint()`` will say after the load; "?"
            for a new stream of a generator that this machine cannot make.
    """

    row: int
    ranks: tuple[int, ...]
    fate: str
    source: int
    forked: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)


class Resumed:
    """What becomes of one RNG entry.

    Args:
        table: The entry in the checkpoint.
        options: The job that resumes.

    Attributes:
        key: The key of the entry.
        rows_saved: Rows in the checkpoint, by what it says.
        rows: Rows of the resumed job.
        fates: One for each row of the resumed job, then one for each row that is dropped.
        remarks: What ``StatefulRNG`` will say, a sentence each.
        needs_planner: Whether ``dcp.load`` needs ``RNGLoadPlanner``.
        refusals: Why a load raises, by saved row.
    """

    def __init__(self, table: Table, options: argparse.Namespace) -> None:
        good = (found for row in table.placed if isinstance(found := table.read(row), Record))
        self._record = next(good, None)
        self._job = Resuming(options, self._record)
        self.key, self.rows_saved, self.rows = table.key, table.count, len(self._job.ranks)
        self.remarks: tuple[str, ...] = ()
        self.refusals: dict[int, str] = {}
        dropped = [row for row in table.placed if row >= self.rows]
        self._many = self.rows + len(dropped) > MANY and options.rows is None and not options.json
        # A new stream's fingerprints take longer than all the rest.
        listed = () if self._many else options.rows
        sources = range(min(self.rows, table.count))
        self.fates = [fate for source in sources for fate in self._fates(table, source, listed)]
        self.fates.sort(key=lambda fate: fate.row)
        self.fates += [Fate(row, (), DROPPED, row) for row in dropped]
        length = self._job.length(self._record) if self._record else table.length
        self.needs_planner = (self.rows, length) != (self.rows_saved, table.length)

    def _fates(self, table: Table, source: int, listed: Sequence[range] | None) -> Iterator[Fate]:
        """Return what becomes of the rows that are made from a saved one."""
        record = table.read(source)
        if isinstance(record, str):
            refused = [record]
        else:
            slots, bad = self._job.of_row(0, record).slots, refusals(record)
            refused = [f"not taken by its generator ({n}: {bad[n]})" for n in bad if n in slots]
        why = "it was saved with use_collectives=False, for the rank of its number alone"
        outcomes: dict[bool, Resume] = {}
        for row in range(source, self.rows, self.rows_saved):
            ranks, is_listed = tuple(self._job.ranks[row]), within(row, listed)
            hidden = [f"not found by rank {n}: {why}" for n in table.hidden_from(source, ranks)]
            if isinstance(record, str) or refused or hidden:
                self.refusals[source] = [*refused, *hidden][0]
                yield Fate(row, ranks, REFUSED, source)
                continue
            is_new = row != source
            if is_listed or is_new not in outcomes:  # new rows differ in their seeds alone
                outcomes[is_new] = resume(record, self._job.of_row(row, record))
            outcome = outcomes[is_new]
            self.remarks = self.remarks or outcome.remarks
            fate = (FORKED if outcome.seeds else COPIED) if is_new else CONTINUED
            fingerprints = _fingerprints(record, outcome) if is_listed else {}
            yield Fate(row, ranks, fate, source, tuple(outcome.seeds), fingerprints)

    def _plays(self) -> str:
        rows: dict[int, list[int]] = {}
        for row, ranks in enumerate(self._job.ranks):
            for rank in ranks:
                rows.setdefault(rank, []).append(row)
        plays = [f"rank {rank} plays {spans(rows[rank]).replace('-', ' to ')}" for rank in rows]
        whole = all(fate.fate == CONTINUED for fate in self.fates)
        endings = ["..."] * (len(plays) > 4) + ["every stream continues"] * whole
        return ", ".join([*plays[:4], *endings])

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        """Return what ``--json`` prints; of the fates only those of ``rows``."""
        names = ("key", "rows_saved", "rows", "needs_planner", "remarks", "refusals")
        fates = [asdict(fate) for fate in self.fates if within(fate.row, rows)]
        return {**{name: getattr(self, name) for name in names}, "fates": fates}

    def lines(self, rows: Sequence[range] | None) -> list[str]:
        """Return the text for a person; of the fates only those of ``rows``."""
        lines = title(self.key, self.rows_saved, self._record)
        world_size = len({rank for fate in self.fates for rank in fate.ranks})
        how = "planner=RNGLoadPlanner()" if self.needs_planner else "plain dcp.load"
        size = f"{plural(world_size, 'rank')}, {plural(self.rows, 'row')}"
        lines += paragraph(f"On {size}, with {how}:")
        if self._job.logical:
            lines += paragraph(self._plays())
        fates = [fate for fate in self.fates if within(fate.row, rows)]
        if self._many:
            lines += _summary(fates)
        else:
            names = list(dict.fromkeys(name for fate in fates for name in fate.fingerprints))
            cells = []
            for fate in fates:
                digits = [fate.fingerprints.get(name, "-") for name in names]
                source = f", from {fate.source}" * (fate.fate in (FORKED, COPIED))
                cells.append([str(fate.row), spans(fate.ranks) or "-", fate.fate + source, *digits])
            lines += aligned(["row", "ranks", "streams", *names], cells)
        for remark in self.remarks:
            lines += paragraph(f"note: {remark}")
        for reason in dict.fromkeys(self.refusals.values()):
            refused = numbered("row", [r for r, why in self.refusals.items() if why == reason])
            lines += paragraph(f"refused: a load raises, for saved {refused}: {reason}")
        return lines


def _fingerprints(record: Record, outcome: Resume) -> dict[str, str]:
    found = {name: fingerprint(state) for name, state in outcome.states.items()}
    for name, seed in outcome.seeds.items():
        state = packed_after_seed(record.streams[name].kind, seed)
        found[name] = "?" if state is None else fingerprint(state)
    return found


def _summary(fates: Sequence[Fate]) -> list[str]:
    """Return a line for each fate."""
    rows: dict[str, list[int]] = {}
    for fate in fates:
        rows.setdefault(fate.fate, []).append(fate.row)
    return [f"  {numbered('row', alike)}: {name}" for name, alike in rows.items()]
