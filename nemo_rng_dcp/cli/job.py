"""The job that resumes, as the options of ``explain`` describe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from nemo_rng_dcp.generators import Slot, is_reserved
from nemo_rng_dcp.record import Mesh, Record, Stream
from nemo_rng_dcp.resume import Job
from nemo_rng_dcp.table import row_major


@dataclass(frozen=True)
class Options:
    """The job that resumes.

    Attributes:
        ranks: The ranks that have each row, see :func:`rows_of_ranks`.
        mesh: The mesh along which its streams differ; ``None``: all ranks.
        ranked: What it gives ``StatefulRNG``; ``None``: what the saved one was given.
        generators: What it has; ``None``: what was saved.
        shared: Which of them are alike on all ranks; ``None``: those that were when saved.
    """

    ranks: Mapping[int, tuple[int, ...]]
    mesh: Mesh | None = None
    ranked: bool | None = None
    generators: Sequence[str] | None = None
    shared: Sequence[str] | None = None

    def job(self, row: int, record: Record) -> Job:
        """Return the job as one of its rows sees it, which loads ``record``."""
        names = record.streams if self.generators is None else self.generators
        slots = {}
        for name in names:
            stream = record.streams.get(name, Stream("", False, b""))
            shared = stream.shared if self.shared is None else name in self.shared
            slots[name] = Slot(stream.kind, shared, is_reserved(name))
        ranked = record.ranked if self.ranked is None else self.ranked
        return Job(row, len(self.ranks), self.mesh, ranked, slots)


def rows_of_ranks(
    world_size: int, mesh: Mapping[str, int] | None, along: Sequence[str] | None
) -> tuple[dict[int, tuple[int, ...]], Mesh | None]:
    """Return the ranks that have each row, as ``StatefulRNG(mesh=mesh[along])`` gives them out.

    Args:
        world_size: Ranks of the job, >= 1.
        mesh: Sizes by name of the dimension, as for ``init_device_mesh``; ``None``: one row a rank.
        along: The dimensions along which streams differ; ``None``: all.

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
    unknown = [name for name in along or () if name not in mesh]
    if unknown:
        raise ValueError(f"the mesh has no dimension {unknown[0]!r}, only {', '.join(mesh)}")
    names = [name for name in mesh if along is None or name in along]
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
