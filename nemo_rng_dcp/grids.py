"""Grids of ranks, and the keys under which they store their tables.

An actor and a critic, or an encoder and a language model, may have meshes of their own in one job,
which are no parts of one mesh: two grids. Under one key DCP would take the rows of one for copies
of the other's. So the key of a grid without rank 0 has its lowest rank in it: ``rng_streams@4``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch.distributed import device_mesh
from torch.distributed.checkpoint import ReadItem
from torch.distributed.device_mesh import DeviceMesh

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.keys import KEY, beside, is_name


class Grid(NamedTuple):
    """Where a mesh lies among the ranks; found once, as it takes a tensor of all ranks.

    Attributes:
        rank: This process's rank when the mesh was made.
        lowest, highest: Ranks of the mesh that this one is a part of.
        parts: Names and sizes of the dimensions of that mesh along which this one lies, if its own
            have other names; else ``None``.
        on_cpu: The mesh, or a CPU mesh of the same ranks over the same groups.
    """

    rank: int
    lowest: int
    highest: int
    parts: tuple[tuple[str, int], ...] | None
    on_cpu: DeviceMesh

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Grid:
        """Return it; does not communicate and creates no process group.

        Raises:
            ValueError: This process's rank is not in ``mesh``.
        """
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"rank {mesh.get_rank()} is not in the mesh {mesh}, so it has no row")
        ranks = mesh.mesh
        own = int(ranks[tuple(coordinate)])
        whole = _whole(mesh)
        if whole is None:
            return cls(own, 0, int(ranks.max()), None, _on_cpu(mesh))
        grid = whole.mesh
        parts = _parts(mesh, ranks, whole, grid)
        return cls(own, int(grid.min()), int(grid.max()), parts, _on_cpu(mesh))

    @property
    def key(self) -> str:
        """The key of the grid's table in the state dict of a ``StatefulRNG``."""
        return f"{KEY}@{self.lowest}" if self.lowest else KEY


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


def _whole(mesh: DeviceMesh) -> DeviceMesh | None:
    # Private, and nothing else tells: a part of a mesh knows its own ranks only.
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    of_all: Any = getattr(device_mesh, "_mesh_resources", None)  # torch 2.9
    whole: DeviceMesh | None = of_all.get_root_mesh(mesh) if of_all else None
    return whole


def _on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.device_type == "cpu":
        return mesh
    # DTensor would move a record to the mesh's device, and DCP back to write it.
    groups = mesh.get_all_groups()
    return DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=names_of(mesh))


def _parts(
    mesh: DeviceMesh, ranks: torch.Tensor, whole: DeviceMesh, grid: torch.Tensor
) -> tuple[tuple[str, int], ...] | None:
    """Return the dimensions of the whole mesh along which a part lies under other names."""
    names = names_of(whole)
    if set(names_of(mesh)) <= set(names):
        return None
    places = torch.isin(grid, ranks).nonzero()
    return tuple(
        (name, whole.size(dim))
        for dim, name in enumerate(names)
        if len(set(places[:, dim].tolist())) > 1
    )
