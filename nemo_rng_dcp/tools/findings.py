"""What is wrong with the RNG state in a checkpoint, and what is worth knowing about it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rng_dcp.adapters import GeneratorAdapter, NumPyAdapter, PythonAdapter
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import is_reserved
from nemo_rng_dcp.origin import ORIGIN, Origin
from nemo_rng_dcp.rows import fingerprint, unseal
from nemo_rng_dcp.seeding import SEED_LIMIT
from nemo_rng_dcp.tools.foreign import ForeignState
from nemo_rng_dcp.tools.reading import Entry
from nemo_rng_dcp.torch_adapters import TorchAdapter


@dataclass(frozen=True)
class Finding:
    """Something that a person should look at.

    Attributes:
        path: The RNG entry.
        table: The generator's table; empty where it is about all of them.
        rows: The rows; empty where it is about all of them.
        text: What was found.
    """

    path: str
    table: str
    rows: tuple[int, ...]
    text: str


@dataclass
class Streams:
    """The good rows of an entry and what was found out about it.

    Attributes:
        key: The dotted path of the entry, "" at the top level of the checkpoint.
        count: Rows of every table.
        generators: The names of the tables but ``origin``.
        origins: By row.
        states: By row and generator: the state, int64, shape ``(n,)``.
        digests: By row and generator: 12 digits, as of ``StatefulRNG.fingerprint()``.
        findings: What was found.
    """

    key: str
    count: int
    generators: list[str]
    origins: dict[int, Origin]
    states: dict[int, dict[str, torch.Tensor]]
    digests: dict[int, dict[str, str]]
    findings: list[Finding]


def examine(entry: Entry) -> Streams:
    """Check every row of an entry as a load would, and compare the rows with each other."""
    damage: dict[tuple[str, str], list[int]] = {}
    generators = [name for name in entry.tables if name != ORIGIN]
    streams = Streams(entry.key, entry.count, generators, {}, {}, {}, [])
    known = private_generators()
    for row in sorted({row for table in entry.tables.values() for row in table.rows}):
        _examine_row(entry, row, known, streams, damage)
    for name, table in entry.tables.items():
        for row, reason in table.failures.items():
            damage.setdefault((name, f"missing: {reason}"), []).append(row)
        # The number of rows is the metadata's word alone: nothing here is as long as it says.
        covered = sum(row < entry.count for row in table.rows.keys() | table.failures.keys())
        if covered < entry.count:
            first = next(
                r for r in range(entry.count) if not (r in table.rows or r in table.failures)
            )
            text = (
                f"{entry.count - covered} of {entry.count} rows are missing, the first is {first}"
            )
            damage.setdefault((name, text), [])
    for (name, text), rows in damage.items():
        streams.findings.append(Finding(entry.key, name, tuple(rows), text))
    for name in known.keys() - entry.tables.keys():
        text = "the checkpoint has no such table: a load leaves this stream as it is"
        streams.findings.append(Finding(entry.key, name, (), text))
    streams.findings += _disagreements(streams)
    streams.findings += _shared(streams)
    streams.findings += _at_their_seed(streams)
    return streams


def examine_foreign(state: ForeignState, writers: set[int]) -> tuple[list[Finding], list[str]]:
    """Return findings and notes on RNG state that no ``StatefulRNG`` stored.

    Args:
        state: The state.
        writers: The ranks that wrote the checkpoint's files.
    """
    where = state.path or "the top level"
    findings, notes = [], []
    if state.ranks:
        notes.append(
            f"{where}: one key a rank, {len(state.ranks)} ranks. On another number of ranks a new "
            "rank finds no key of its own."
        )
        missing = set(range(max(state.ranks) + 1)) | writers
        if missing := missing - state.ranks:
            text = "these ranks wrote or are counted, but have no RNG state"
            findings.append(Finding(state.path, "", tuple(sorted(missing)), text))
    elif len(writers) > 1:
        kept = ", ".join(f"{name} is rank {rank}'s" for name, rank in state.writers.items())
        text = (
            f"one state for all ranks, though {len(writers)} or more wrote this checkpoint: DCP "
            f"took equal keys for copies and kept one of each ({kept}). The other ranks' streams "
            "are lost, and after a load all ranks draw the same numbers."
        )
        findings.append(Finding(state.path, "", (), text))
    else:
        notes.append(
            f"{where}: one state, and one rank wrote the checkpoint. Loaded by several ranks, all "
            "would draw the same numbers."
        )
    if state.pickled:
        notes.append(f"{where}: stored as pickles, which were not read.")
    return findings, notes


def private_generators() -> dict[str, GeneratorAdapter]:
    """Return generators like the global ones on the CPU that belong to nobody else."""
    return {
        "python": PythonAdapter(random.Random()),
        "numpy": NumPyAdapter(np.random.RandomState()),
        "torch": TorchAdapter(torch.Generator()),
    }


def _examine_row(
    entry: Entry,
    row: int,
    known: Mapping[str, GeneratorAdapter],
    streams: Streams,
    damage: dict[tuple[str, str], list[int]],
) -> None:
    if row not in entry.tables[ORIGIN].rows:
        return
    try:
        origin = Origin.from_row(entry.tables[ORIGIN].rows[row])
        if (origin.row, origin.rows) != (row, entry.count):
            raise RNGStateError(
                f"{ORIGIN}: it says that it is row {origin.row} of {origin.rows}, and stands in "
                f"a table of {entry.count}"
            )
    except RNGStateError as error:
        damage.setdefault((ORIGIN, str(error).removeprefix(f"{ORIGIN}: ")), []).append(row)
        return
    streams.origins[row] = origin
    states = {}
    for name in streams.generators:
        stored = entry.tables[name].rows.get(row)
        if stored is None:
            continue
        try:
            state = unseal(name, row, origin.contents, stored)
            if name in known:
                known[name].check(state)
        except RNGStateError:
            text = (
                "damaged: the row does not fit its check word. It was altered after it was "
                "written, or is another rank's, generator's or moment's"
            )
            damage.setdefault((name, text), []).append(row)
        except ValueError as error:
            damage.setdefault((name, f"a load refuses it: {error}"), []).append(row)
        else:
            states[name] = state
    streams.states[row] = states
    streams.digests[row] = {name: fingerprint(state) for name, state in states.items()}


def _disagreements(streams: Streams) -> Iterator[Finding]:
    """Find rows that were not written by the job that wrote the first one."""
    if not streams.origins:
        return
    first, *others = streams.origins.items()
    for name in ("world_size", "seed", "ranked", "resizes", "torch_version", "numpy_version"):
        expected = getattr(first[1], name)
        rows = tuple(row for row, origin in others if getattr(origin, name) != expected)
        if rows:
            text = f"another {name.replace('_', ' ')} than row {first[0]}'s {expected}"
            yield Finding(streams.key, ORIGIN, rows, text)


def _shared(streams: Streams) -> Iterator[Finding]:
    """Find rows that hold one and the same stream although the job's streams were to differ."""
    for name in streams.generators:
        why = (
            "although ranked"
            if is_reserved(name)
            else "though the job is ranked: StatefulRNG does not seed what is registered, so give "
            "each rank a seed of its own, unless all are to draw alike"
        )
        holders: dict[str, list[int]] = {}
        for row, digests in streams.digests.items():
            if name in digests and streams.origins[row].ranked:
                holders.setdefault(digests[name], []).append(row)
        for digits, rows in holders.items():
            if len(rows) > 1:
                text = f"these rows share one stream ({digits}) {why}"
                yield Finding(streams.key, name, tuple(rows), text)


def _at_their_seed(streams: Streams) -> Iterator[Finding]:
    """Find streams from which nothing was drawn since the job was seeded."""
    for name, generator in private_generators().items():
        rows = tuple(
            row
            for row, states in streams.states.items()
            if name in states and _is_at_seed(generator, streams.origins[row], states[name])
        )
        if rows:
            text = "still at its seed: nothing was drawn from it, or it was seeded again"
            yield Finding(streams.key, name, rows, text)


def _is_at_seed(generator: GeneratorAdapter, origin: Origin, state: torch.Tensor) -> bool:
    seed = origin.seed + (origin.row if origin.ranked else 0)
    if not 0 <= seed < SEED_LIMIT:
        return False
    generator.seed(seed)
    return torch.equal(generator.read(), state)
