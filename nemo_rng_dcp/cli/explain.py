"""``nemo-rng-dcp explain``: what a resume would do to each stream, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_rng_dcp.cli.checkpoint.table import Table
from nemo_rng_dcp.cli.heading import title
from nemo_rng_dcp.cli.job import Options
from nemo_rng_dcp.cli.terminal import (
    MANY,
    Style,
    paragraph,
    plural,
    short_spans,
    spans,
    table,
    within,
)
from nemo_rng_dcp.cli.trial_generators import packed_after_seed, refusals
from nemo_rng_dcp.generators import is_reserved
from nemo_rng_dcp.record import Record, fingerprint
from nemo_rng_dcp.resume import Resume, resume
from nemo_rng_dcp.table import source_row

CONTINUED, COPIED, FORKED = "continued", "copied", "forked"
DROPPED, REFUSED = "dropped", "refused"
_COLOURS = {CONTINUED: "green", COPIED: "yellow", FORKED: "yellow", REFUSED: "red"}


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
        digests: By generator what ``StatefulRNG.fingerprint()`` will say after the load; "?" for a
            new stream of a generator that this machine cannot make.
    """

    row: int
    ranks: tuple[int, ...]
    fate: str
    source: int
    forked: tuple[str, ...]
    digests: Mapping[str, str]


def explanations_of(tables: Sequence[Table], options: Options) -> list[Explanation]:
    """Return what becomes of each RNG entry.

    Raises:
        ValueError: A shared generator is one that the job cannot have.
    """
    explanations = [Explanation(table, options) for table in tables]
    saved = list(dict.fromkeys(name for each in explanations for name in each.generators))
    known = saved if options.generators is None else options.generators
    for name in options.shared or ():
        if is_reserved(name):
            raise ValueError(f"--shared {name}: it is a global generator, which is never shared")
        if known and name not in known:
            raise ValueError(
                f"--shared {name}: the job has no such generator, only {', '.join(known)}. "
                "--generators names all that it has"
            )
    return explanations


class Explanation:
    """What becomes of one RNG entry.

    Args:
        table: The entry in the checkpoint.
        options: The job that resumes.

    Attributes:
        path: The dotted path of the entry.
        rows_saved: Rows in the checkpoint, by what it says.
        rows: Rows of the resumed job.
        fates: One for each row of the resumed job, then one for each row that is dropped.
        remarks: What ``StatefulRNG`` will say, a sentence each.
        needs_planner: Whether ``dcp.load`` needs ``RNGLoadPlanner``.
        refusals: Why a load raises, by saved row.
        generators: Those that the records have which are loaded, in their order.
    """

    def __init__(self, table: Table, options: Options) -> None:
        self.path, self.rows_saved, self.rows = table.path, table.count, len(options.ranks)
        self.remarks: tuple[str, ...] = ()
        self.refusals: dict[int, str] = {}
        self.needs_planner = self.rows != self.rows_saved
        self.generators: dict[str, None] = {}
        self._record: Record | None = None
        self.fates = [
            self._fate(table, options, row, those) for row, those in options.ranks.items()
        ]
        self.fates += [
            Fate(row, (), DROPPED, row, (), {}) for row in table.placed if row >= self.rows
        ]

    def _fate(self, table: Table, options: Options, row: int, ranks: tuple[int, ...]) -> Fate:
        source = source_row(row, table.count)
        record = table.read(source)
        if isinstance(record, str):
            self.refusals[source] = record
            return Fate(row, ranks, REFUSED, source, (), {})
        self._record = self._record or record
        self.generators |= dict.fromkeys(record.streams)
        if hidden := table.hidden_from(source, ranks):
            self.refusals[source] = (
                f"not found by rank {hidden[0]}: it was saved with use_collectives=False, so each "
                "rank finds only what the rank of its number saved"
            )
            return Fate(row, ranks, REFUSED, source, (), {})
        job = options.job(row, record)
        outcome = resume(record, job)
        loaded = outcome.states.keys()
        refused = [f"{name}: {why}" for name, why in refusals(record).items() if name in loaded]
        if refused:
            self.refusals[source] = f"not taken by its generator ({refused[0]})"
            return Fate(row, ranks, REFUSED, source, (), {})
        self.remarks = self.remarks or outcome.remarks
        self.needs_planner |= job.slots.keys() != record.streams.keys()
        new = COPIED if not outcome.seeds else FORKED
        fate = CONTINUED if source == row else new
        return Fate(row, ranks, fate, source, tuple(outcome.seeds), _digests(record, outcome))

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        """Return what ``--json`` prints; of the fates only those of ``rows``."""
        return {
            "path": self.path,
            "rows_saved": self.rows_saved,
            "rows": self.rows,
            "needs_planner": self.needs_planner,
            "remarks": self.remarks,
            "fates": [asdict(fate) for fate in self.fates if within(fate.row, rows)],
            "refusals": self.refusals,
        }

    def lines(self, rows: Sequence[range] | None, style: Style) -> list[str]:
        """Return the text for a person; of the fates only those of ``rows``."""
        lines = title(self.path, self.rows_saved, self._record, style)
        world_size = sum(len(fate.ranks) for fate in self.fates)
        how = "planner=RNGLoadPlanner()" if self.needs_planner else "plain dcp.load"
        lines += paragraph(
            f"On {plural(world_size, 'rank')}, {plural(self.rows, 'row')}, with {how}:", 2
        )
        fates = [fate for fate in self.fates if within(fate.row, rows)]
        if rows is None and len(fates) > MANY:
            lines += _summary(fates, self.rows_saved)
        else:
            names = list(dict.fromkeys(name for fate in fates for name in fate.digests))
            cells = [
                [
                    str(fate.row),
                    spans(fate.ranks) or "-",
                    _fate_text(fate),
                    *(fate.digests.get(name, "-") for name in names),
                ]
                for fate in fates
            ]
            lines += table(["row", "ranks", "streams", *names], cells, style)
        for remark in self.remarks:
            lines += paragraph(f"note: {remark}", 2)
        for reason in dict.fromkeys(self.refusals.values()):
            those = sorted(row for row, its in self.refusals.items() if its == reason)
            row, are = ("row", "is") if len(those) == 1 else ("rows", "are")
            text = f"refused: a load raises, for saved {row} {short_spans(those)} {are} {reason}"
            lines += [style(line, "red") for line in paragraph(text, 2)]
        return lines


def _digests(record: Record, outcome: Resume) -> dict[str, str]:
    digests = {}
    for name, stream in record.streams.items():
        if name in outcome.seeds:
            state = packed_after_seed(stream.kind, outcome.seeds[name])
            digests[name] = "?" if state is None else fingerprint(state)
        elif name in outcome.states:
            digests[name] = fingerprint(stream.state)
    return digests


def _fate_text(fate: Fate) -> str:
    return f"{fate.fate}, from {fate.source}" if fate.fate in (FORKED, COPIED) else fate.fate


def _summary(fates: Sequence[Fate], rows_saved: int) -> list[str]:
    """Return a line for each fate, and for each way in which its rows are made."""
    groups: dict[tuple[str, bool], list[Fate]] = {}
    for fate in fates:
        groups.setdefault((fate.fate, fate.source == fate.row), []).append(fate)
    lines = []
    for (name, its_own), alike in groups.items():
        rows = f"row{'s' * (len(alike) > 1)} {short_spans([fate.row for fate in alike])}"
        source = f"r % {rows_saved}" if len(alike) > 1 else str(alike[0].source)
        lines.append(f"  {rows}: {name}{'' if its_own else f', from row {source}'}")
    return lines
