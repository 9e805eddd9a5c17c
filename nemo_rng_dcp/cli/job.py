"""The job that resumes, as the options of ``explain`` describe it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from math import prod

import numpy as np

from nemo_rng_dcp.generators import Slot, is_reserved
from nemo_rng_dcp.record import Mesh, Record
from nemo_rng_dcp.resume import Job

OF_ONE_ENTRY = ("along", "logical_ranks", "ranked")
"""Options of ``explain`` that one ``StatefulRNG`` is given."""


class Resuming:
    """The job that resumes, as its ``StatefulRNG`` for one entry is made.

    Args:
        options: As ``arguments`` describes them. What is left out is as in ``saved``.
        saved: One of the entry's records; ``None``: there is no good one.

    Attributes:
        ranks: The ranks that have each row.
        mesh: The mesh along which its streams differ; ``None``: all ranks.
        logical: Whether a row is a logical rank.

    Raises:
        ValueError: Such a job cannot exist.
    """

    def __init__(self, options: argparse.Namespace, saved: Record | None) -> None:
        self.mesh = _mesh(options, saved.mesh if saved else None)
        sizes = options.mesh or {"ranks": options.world_size}
        along = [*sizes] if self.mesh is None else [name for name, _ in self.mesh]
        grid = np.arange(options.world_size).reshape([*sizes.values()])
        grid = np.moveaxis(grid, [[*sizes].index(name) for name in along], range(len(along)))
        ranks = grid.reshape(prod(sizes[name] for name in along), -1).tolist()
        count = options.logical_ranks or len(ranks)
        rows_of_each, rest = divmod(count, len(ranks))
        if rest:
            raise ValueError(f"--logical-ranks {count} is no multiple of {len(ranks)} rows")
        self.ranks: list[list[int]] = [ranks[row // rows_of_each] for row in range(count)]
        self.logical = options.logical_ranks is not None
        if self.logical and options.ranked is False:
            raise ValueError("--no-ranked: logical ranks have streams of their own")
        self._ranked = True if self.logical else options.ranked

    def of_row(self, row: int, record: Record) -> Job:
        """Return the job as one of its rows sees it, which loads ``record``."""
        slots = {
            name: Slot(stream.kind, stream.shared, is_reserved(name))
            for name, stream in record.streams.items()
        }
        ranked = record.ranked if self._ranked is None else self._ranked
        return Job(row, len(self.ranks), self.mesh, ranked, slots, logical=self.logical)

    def length(self, record: Record) -> int:
        """Return how many numbers its own record has."""
        return len(replace(record, mesh=self.mesh).to_tensor())


def _mesh(options: argparse.Namespace, saved: Mesh | None) -> Mesh | None:
    """Return the mesh along which the job's streams differ, as a record stores it."""
    mesh, along = options.mesh, options.along
    if mesh is None:
        if along is not None:
            raise ValueError("--along names dimensions of a mesh: give --mesh too")
        return None
    if prod(mesh.values()) != options.world_size:
        text = f"{' x '.join(map(str, mesh.values()))} has {prod(mesh.values())} ranks"
        raise ValueError(f"a mesh of {text}, not {options.world_size}")
    if along is None:
        if saved is None:
            return None
        along = [name for name in mesh if name in dict(saved)]
        along = along if len(along) == len(saved) else list(mesh)
    names = [name for name in mesh if name in along]
    if along != names:  # torch refuses it too
        expected = f"expected dimensions once and in the mesh's order, {','.join(mesh)}"
        raise ValueError(f"--along {','.join(along)}: {expected}")
    return tuple((name, mesh[name]) for name in names)
