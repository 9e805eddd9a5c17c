"""The rules of a resume: what becomes of each stream when a record is loaded into a row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import Slot
from nemo_rng_dcp.record import Mesh, Record, mesh_text
from nemo_rng_dcp.table import source_row
from nemo_rng_dcp.versions import HASH_SEED, UNSEEDED


@dataclass(frozen=True)
class Job:
    """The job that loads, seen from one row.

    Attributes:
        row: The row, ``0 <= row < rows``.
        rows: Rows of the table.
        mesh: The mesh along which streams differ; ``None``: all ranks.
        ranked: What its ``StatefulRNG`` was given.
        slots: Its generators by name.
        parts: The dimensions that a flattened ``mesh`` is made of; ``None``: it is none.
        seed: What its ``StatefulRNG`` was given; ``None``: it is of no account.
        logical: Whether a row is a logical rank, which has no coordinate of its own.
    """

    row: int
    rows: int
    mesh: Mesh | None
    ranked: bool
    slots: Mapping[str, Slot]
    parts: Mesh | None = None
    seed: int | None = None
    logical: bool = False


@dataclass(frozen=True)
class Loaded:
    """Where streams that were restored come from.

    All are ``None`` for a state that does not say, such as NeMo Automodel's.

    Attributes:
        rows: Rows of the table that was saved.
        world_size: Ranks of the job that saved it.
        saved_at: When the streams were taken, UTC.
    """

    rows: int | None = None
    world_size: int | None = None
    saved_at: datetime | None = None

    @classmethod
    def from_record(cls, record: Record) -> Loaded:
        """Return what a record says of itself."""
        saved_at = datetime.fromtimestamp(record.taken_at / 10**9, timezone.utc)
        return cls(record.rows, record.world_size, saved_at)


@dataclass(frozen=True)
class Resume:
    """What a load does.

    Attributes:
        states: By generator, the packed state that was saved and is restored, bit for bit.
        seeds: By generator, the seed of the new stream that a new row starts instead.
        resizes: How often the job was resumed with another number of rows, this time included.
        remarks: What a person should know, a sentence each; none if the same job loads.
        of_generators: Those of the remarks that may hold for this row alone.
        loaded: Where the streams come from.
    """

    states: Mapping[str, bytes]
    seeds: Mapping[str, int]
    resizes: int
    remarks: tuple[str, ...]
    of_generators: tuple[str, ...]
    loaded: Loaded


def resume(record: Record, job: Job) -> Resume:
    """Return what loading ``record`` into the row of ``job`` does; moves no stream.

    A row that was saved continues. A new row forks: its global generators unless neither job is
    ranked, the registered ones always, the shared ones never.

    Raises:
        RNGStateError: A generator is of another kind than the saved one.
    """
    loaded = Loaded.from_record(record)
    for name, slot in job.slots.items():
        if name in record.streams and record.streams[name].kind != slot.kind:
            raise RNGStateError(
                f"{name}: the checkpoint holds the state of a {record.streams[name].kind} "
                f"generator, and this job's is {slot.kind}. Give StatefulRNG the generator that it "
                "had when the state was saved, or give the new one another name."
            )
    saved = [name for name in job.slots if name in record.streams]
    resizes = record.resizes + (record.rows != job.rows)
    forked = _forked(record, job, saved)
    of_generators = tuple(_on_generators(record, job))
    seeds = {
        name: fork_seed(name, job.row, resizes, record.streams[name].state)
        for name in forked
        if job.row != record.row
    }
    return Resume(
        {name: record.streams[name].state for name in saved},
        seeds,
        resizes,
        (*_on_rows(record, job, saved, forked), *of_generators, *_on_surroundings(record)),
        of_generators,
        loaded,
    )


def fork_seed(name: str, row: int, resizes: int, state: bytes) -> int:
    """Return the seed of a new row's stream, which is made from another row's.

    It depends on the state it is made from, so it moves on with the job, and on ``resizes``, so a
    job that grows twice from one unmoved state does not replay what it drew in between.

    Args:
        name: The generator's name.
        row: The new row.
        resizes: How often the job was resumed with another number of rows, this time included.
        state: The other row's packed state.

    Returns:
        An integer from 0 to 2**64 - 1.
    """
    content = f"fork of {name}\0{row}\0{resizes}\0".encode() + state
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _forked(record: Record, job: Job, saved: list[str]) -> list[str]:
    """Return the generators that start a new stream where the row is a new one."""
    ranked = record.ranked or job.ranked
    return [
        name
        for name in saved
        if not job.slots[name].shared and (ranked or not job.slots[name].is_global)
    ]


def _on_rows(record: Record, job: Job, saved: list[str], forked: list[str]) -> Iterator[str]:
    rows, now = record.rows, job.rows
    if now < rows:
        yield f"{rows} rows were saved and {now} are loaded: {_rows(now, rows)} dropped"
    elif now > rows:
        as_it_is = [name for name in saved if name not in forked]
        done = [f"{_listed(forked)} forked"] * bool(forked)
        done += [f"{_listed(as_it_is)} taken as saved"] * bool(as_it_is)
        yield (
            f"{rows} rows were saved and {now} are loaded: {_rows(rows, now)} new, "
            f"{_sources(rows, now)} ({'; '.join(done)})"
        )
    meshes = [(record.mesh, job.mesh)]
    if record.parts or job.parts:
        meshes.append((record.parts or record.mesh, job.parts or job.mesh))
        # Of a record without them nobody knows more than the names of its mesh.
        meshes = meshes[1:] if record.parts and job.parts else meshes
    renumbered = all(_renumbered(then, here, min(rows, now)) for then, here in meshes)
    if job.logical or _is_logical(record):
        renumbered = _names(record.mesh) != _names(job.mesh)
    if renumbered:
        yield (
            f"the rows were saved along {mesh_text(meshes[-1][0])} and are loaded along "
            f"{mesh_text(meshes[-1][1])}: row r may belong to another coordinate now"
        )
    has_global = any(slot.is_global for slot in job.slots.values())
    seeds = {record.seed, job.seed} - {None}  # without one, a framework has seeded
    if len(seeds) > 1 and any(job.slots[name].is_global for name in saved):
        yield f"saved with seed={record.seed}, now seed={job.seed}: the saved streams continue"
    if record.ranked != job.ranked and min(rows, now) > 1 and has_global:
        yield (
            f"saved with ranked={record.ranked}, now ranked={job.ranked}: saved rows continue as "
            "they were"
        )
    unchanged = {True: "ranks that differed still do", False: "ranks that drew alike still do"}
    for name in saved if min(rows, now) > 1 else ():
        shared = job.slots[name].shared
        if record.streams[name].shared != shared:
            then, here = sorted(("generators=", "shared_generators="), reverse=not shared)
            yield f"{name} was saved in {then}, now in {here}: {unchanged[shared]}"


def _on_generators(record: Record, job: Job) -> Iterator[str]:
    absent = [name for name in job.slots if name not in record.streams]
    if absent:
        yield f"the checkpoint has no {_listed(absent)}: the stream stays as it is"
    ignored = [name for name in record.streams if name not in job.slots]
    if ignored:
        yield f"the checkpoint has {_listed(ignored)}, which this job does not have: ignored"


def _on_surroundings(record: Record) -> Iterator[str]:
    skew = record.version_skew()
    if skew:
        yield (
            f"saved with {'; '.join(skew)}: the streams continue, but what a library makes of "
            "them may have changed"
        )
    # A job without one had another order at every start, so it relied on none.
    if record.hash_seed not in (UNSEEDED, HASH_SEED):
        yield (
            f"saved with PYTHONHASHSEED {record.hash_seed}, now {HASH_SEED}: a set of strings is "
            f"iterated in another order. Start the job with PYTHONHASHSEED={record.hash_seed}"
        )


def _listed(names: list[str]) -> str:
    """Return the generators of these streams; parts such as ``order.seed_seq`` go with theirs."""
    return ", ".join(name for name in names if name.rpartition(".")[0] not in names)


def _is_logical(record: Record) -> bool:
    """Return whether a record's mesh tells that several rows belonged to one coordinate."""
    return record.mesh is not None and math.prod(size for _, size in record.mesh) != record.rows


def _names(mesh: Mesh | None) -> list[str] | None:
    return None if mesh is None else [name for name, _ in mesh]


def _renumbered(saved: Mesh | None, now: Mesh | None, rows: int) -> bool:
    """Return whether one of the first ``rows`` rows has another coordinate on the mesh now."""
    if saved is None or now is None:
        return saved != now
    stride = 1
    # The last dimension runs fastest. One of size 1 has no part in the numbers.
    then, here = ([part for part in reversed(mesh) if part[1] > 1] for mesh in (saved, now))
    for (name, size), (name_now, size_now) in zip(then, here, strict=False):
        if stride >= rows:
            return False
        if name != name_now or (size != size_now and stride * min(size, size_now) < rows):
            return True
        stride *= size
    return False


def _rows(first: int, end: int) -> str:
    return f"row {first} is" if end - first == 1 else f"rows {first} to {end - 1} are"


def _sources(first: int, end: int) -> str:
    """Return from which saved rows the new ones are made, of ``first`` saved ones."""
    listed = [f"row {row} from row {source_row(row, first)}" for row in range(first, end)[:2]]
    return ", ".join(listed + ["..."] * (end - first > 2))
