"""Grids of ranks, and the keys under which they store their tables.

An actor and a critic, or an encoder and a language model, may have meshes of their own in one job,
which are no parts of one mesh: two grids. Under one key DCP would take the rows of one for copies
of the other's. So the key of a grid without rank 0 has its lowest rank in it: ``rng_streams@4``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch.distributed.checkpoint import ReadItem
from torch.distributed.device_mesh import DeviceMesh

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.ranks import global_rank
from nemo_rng_dcp.record import KEY, Mesh


class Grid(NamedTuple):
    """Where a mesh lies among the ranks; found once, as it takes a tensor of all ranks.

    Attributes:
        rank: This process's rank when the mesh was made.
        lowest, highest: Ranks of the mesh that this one is a part of.
        parts: Names and sizes of the dimensions of that mesh along which this one lies, if its own
            have other names; else ``None``.
    """

    rank: int
    lowest: int
    highest: int
    parts: Mesh | None

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Grid:
        """Return it; does not communicate.

        Raises:
            ValueError: This process's rank is not in ``mesh``.
        """
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"rank {global_rank()} is not in the mesh {mesh}, so it has no row")
        ranks = mesh.mesh
        own = int(ranks[tuple(coordinate)])
        # Private, and nothing else tells: a part of a mesh knows its own ranks only.
        if not hasattr(mesh, "_get_root_mesh"):
            return cls(own, 0, int(ranks.max()), None)
        whole = mesh._get_root_mesh()
        grid = whole.mesh
        return cls(own, int(grid.min()), int(grid.max()), _parts(mesh, ranks, whole, grid))

    @property
    def key(self) -> str:
        """The key of the grid's table in the state dict of a ``StatefulRNG``."""
        return f"{KEY}@{self.lowest}" if self.lowest else KEY


def is_name(name: str, expected: str = KEY) -> bool:
    """Return whether the last part of a key is a record's, of whichever grid."""
    base, at, lowest = name.partition("@")
    return base == expected and (lowest.isdecimal() or not at)


def base_of(key: str) -> str:
    """Return the last part of a key, without the grid."""
    return key.rpartition(".")[2].partition("@")[0]


def path_of(key: str) -> str:
    """Return where the ``StatefulRNG`` of a record is, with its grid unless that has rank 0.

    ``app.rng`` for ``app.rng.rng_streams``, and ``app.rng@4`` for ``app.rng.rng_streams@4``.
    """
    path, _, name = key.rpartition(".")
    return path + name.removeprefix(KEY)


def own_key(key: str, saved: Collection[str]) -> str | None:
    """Return the key of the saved record to load for an entry; ``None``: there is none for it.

    Its own; else that of the only grid without rank 0 that was saved there, which may lie on other
    ranks now. The record of rank 0's grid is no other grid's.

    Args:
        key: The entry's key.
        saved: All keys that there are.
    """
    if key in saved:
        return key
    moved = [other for other in beside(key, saved) if other != renamed(key, base_of(key))]
    return moved[0] if len(moved) == 1 else None


def renamed(key: str, name: str) -> str:
    """Return a key with another last part."""
    path, dot, _ = key.rpartition(".")
    return path + dot + name


def beside(key: str, saved: Collection[str]) -> list[str]:
    """Return the keys, of all that there are, of the records of all grids where an entry is."""
    places = ((other, other.rpartition(".")) for other in saved)
    path, base = key.rpartition(".")[0], base_of(key)
    return [other for other, (place, _, name) in places if place == path and is_name(name, base)]


def warn_if_moved(key: str, source: str, row: int, saved: Collection[str]) -> None:
    """Warn, for row 0, where the record of another grid is loaded and was not the only one.

    Args:
        key: The entry's key.
        source: The key of what is loaded for it.
        row: This process's row.
        saved: All keys that there are.
    """
    if source != key and row == 0 and len(beside(key, saved)) > 1:
        warn(
            f"the checkpoint has no RNG state at {key}: that of the only grid without rank 0, at "
            f"{source}, is loaded, as its ranks may have other numbers now"
        )


def refuse_one_for_two(reads: Iterable[ReadItem]) -> None:
    """Make sure that no two grids load one record.

    Args:
        reads: What all ranks read.

    Raises:
        RNGStateError: Two do.
    """
    entries: dict[str, str] = {}
    for read in reads:
        key, entry = read.storage_index.fqn, read.dest_index.fqn
        if is_name(entry.rpartition(".")[2]) and entries.setdefault(key, entry) != entry:
            raise RNGStateError(
                f"{key}: two grids of ranks would load this record, as {entries[key]} and as "
                f"{entry}: the checkpoint has none of their own. Load each grid's by itself, with "
                "StatefulRNG.load(key=)"
            )


def names_of(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or tuple(str(number) for number in range(mesh.ndim))


def _parts(
    mesh: DeviceMesh, ranks: torch.Tensor, whole: DeviceMesh, grid: torch.Tensor
) -> Mesh | None:
    """Return the dimensions of the whole mesh along which a part lies under other names."""
    names = names_of(whole)
    if set(names_of(mesh)) <= set(names):
        return None
    places = torch.isin(grid, ranks).nonzero()
    return tuple(
        (name, size)
        for name, size, along in zip(names, grid.shape, places.T, strict=True)
        if len(along.unique()) > 1
    )
