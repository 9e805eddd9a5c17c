"""The job that resumes, as the options of ``explain`` describe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from nemo_rng_dcp.generators import Slot, is_reserved
from nemo_rng_dcp.record import Mesh, Record, Stream
from nemo_rng_dcp.resume import Job
from nemo_rng_dcp.table import row_major

OF_ONE_ENTRY = ("along", "logical_ranks", "ranked", "generators", "shared")
"""Options of ``explain`` that one ``StatefulRNG`` is given."""


@dataclass(frozen=True)
class Options:
    """The job that resumes, as its ``StatefulRNG`` for one entry is made.

    Attributes:
        ranks: The ranks that have each row, see :func:`rows_of_ranks`.
        mesh: The mesh along which its streams differ; ``None``: all ranks.
        ranked: What it gives ``StatefulRNG``; ``None``: what the saved one was given.
        generators: What it has; ``None``: what was saved.
        shared: Which of them are alike on all ranks; ``None``: those that were when saved.
        logical: Whether a row is a logical rank.
    """

    ranks: Mapping[int, tuple[int, ...]]
    mesh: Mesh | None = None
    ranked: bool | None = None
    generators: Sequence[str] | None = None
    shared: Sequence[str] | None = None
    logical: bool = False

    def job(self, row: int, record: Record) -> Job:
        """Return the job as one of its rows sees it, which loads ``record``."""
        slots = {}
        for name in self._parts(record):
            stream = record.streams.get(name, Stream("", False, b""))
            shared = stream.shared if self.shared is None else name.split(".")[0] in self.shared
            slots[name] = Slot(stream.kind, shared, is_reserved(name))
        ranked = record.ranked if self.ranked is None else self.ranked
        return Job(row, len(self.ranks), self.mesh, ranked, slots, logical=self.logical)

    def length(self, record: Record) -> int:
        """Return how many numbers the job's own record has, if it has the generators of one."""
        slots = self.job(0, record).slots
        streams = {
            name: s._replace(shared=slots[name].shared) for name, s in record.streams.items()
        }
        return len(replace(record, mesh=self.mesh, streams=streams).to_tensor())

    def _parts(self, record: Record) -> list[str]:
        """Return the names of the job's streams; with a NumPy generator goes its seed sequence."""
        if self.generators is None:
            return list(record.streams)
        return [
            part
            for name in self.generators
            for part in (name, f"{name}.seed_seq")
            if part == name or part in record.streams
        ]


def shared_out(
    ranks: Mapping[int, tuple[int, ...]], logical_ranks: int
) -> dict[int, tuple[int, ...]]:
    """Return the ranks that play each logical rank, by those that would have each row.

    Raises:
        ValueError: They cannot play equally many.
    """
    each, rest = divmod(logical_ranks, len(ranks))
    if rest:
        raise ValueError(f"--logical-ranks {logical_ranks} is no multiple of {len(ranks)} rows")
    return {row: ranks[row // each] for row in range(logical_ranks)}


def rows_of_ranks(
    world_size: int,
    mesh: Mapping[str, int] | None,
    along: Sequence[str] | None,
    saved: Mesh | None = None,
) -> tuple[dict[int, tuple[int, ...]], Mesh | None]:
    """Return the ranks that have each row, as ``StatefulRNG(mesh=mesh[along])`` gives them out.

    Args:
        world_size: Ranks of the job, >= 1.
        mesh: Sizes by name of the dimension, as for ``init_device_mesh``; ``None``: one row a rank.
        along: The dimensions along which streams differ; ``None``: as saved, or all dimensions if
            the mesh does not have those.
        saved: The mesh along which they differed when saved; ``None``: all ranks.

    Returns:
        The ranks by row, and the mesh as a record stores it.

    Raises:
        ValueError: The mesh does not have as many ranks, no such dimension, or another order.
    """
    if mesh is None:
        if along is not None:
            raise ValueError("--along names dimensions of a mesh: give --mesh too")
        return {rank: (rank,) for rank in range(world_size)}, None
    if prod(mesh.values()) != world_size:
        text = " x ".join(map(str, mesh.values()))
        raise ValueError(f"a mesh of {text} has {prod(mesh.values())} ranks, not {world_size}")
    if along is None and saved is None:
        return {rank: (rank,) for rank in range(world_size)}, None
    known = set(along if along is not None else dict(saved or ()))
    if along is None and not known <= mesh.keys():
        known = set(mesh)
    if unknown := known - mesh.keys():
        raise ValueError(f"the mesh has no dimension {min(unknown)!r}, only {', '.join(mesh)}")
    names = [name for name in mesh if name in known]
    if along is not None and names != list(along):
        expected = f"torch takes each dimension once and in the mesh's order, {','.join(names)}"
        raise ValueError(f"--along {','.join(along)}: {expected}")
    ranks: dict[int, list[int]] = {}
    for rank in range(world_size):
        coordinate, rest = {}, rank
        for name in reversed(list(mesh)):
            rest, coordinate[name] = divmod(rest, mesh[name])
        row = row_major([coordinate[name] for name in names], [mesh[name] for name in names])
        ranks.setdefault(row, []).append(rank)
    by_row = {row: tuple(found) for row, found in sorted(ranks.items())}
    return by_row, tuple((name, mesh[name]) for name in names)
