"""Which row of a table is this process's, and how that row becomes a table that DCP stores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemo_rng_dcp.errors import RNGStateError


def global_rank() -> int:
    """Return this process's global rank; does not communicate.

    The default process group decides. Before it exists, torchrun's ``RANK`` variable does, and
    without either the process is rank 0.

    Raises:
        ValueError: ``RANK`` is set but is no rank.
    """
    if _has_process_group():
        return dist.get_rank()
    value = os.environ.get("RANK", "0")
    if not value.isdecimal():
        raise ValueError(f"the environment variable RANK is {value!r}, expected an integer >= 0")
    return int(value)


def world_size() -> int:
    """Return the default process group's size, 1 without one; does not communicate."""
    return dist.get_world_size() if _has_process_group() else 1


@dataclass(frozen=True)
class Layout:
    """One row per coordinate of a mesh, numbered row-major.

    Attributes:
        row: The row that belongs to this process, ``0 <= row < rows``.
        rows: Rows of every table.
        mesh: The mesh along which streams differ; ``None``: all ranks of the default process
            group, or no group at all.
    """

    row: int
    rows: int
    mesh: DeviceMesh | None

    @classmethod
    def current(cls, mesh: DeviceMesh | None = None) -> Layout:
        """Return the layout as of now; does not communicate and creates no process group.

        Args:
            mesh: The (sub)mesh along which streams differ, of any number of dimensions. Ranks of
                one coordinate share a row. ``None``: all ranks of the default process group, so
                that row = global rank; without a group, one row.

        Raises:
            ValueError: This process's rank is not in ``mesh``.
        """
        if mesh is None:
            row = dist.get_rank() if _has_process_group() else 0
            return cls(row, world_size(), None)
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"rank {global_rank()} is not in the mesh {mesh}, so it has no row")
        return cls(row_major(coordinate, mesh.shape), mesh.size(), mesh)

    def tables(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tables of which ``rows`` are this process's part; does not communicate.

        Args:
            rows: By table name, shape ``(n,)`` each.

        Returns:
            By table name, shape ``(rows, n)`` each: a DTensor sharded on dim 0, or a plain tensor
            without a process group. DCP stores either as one chunk per row.
        """
        if self.mesh is None and not _has_process_group():
            return {name: row.unsqueeze(0) for name, row in rows.items()}
        mesh = self.mesh or _mesh_of_all_ranks()
        return {
            name: DTensor.from_local(
                row.unsqueeze(0),
                mesh,
                # Sharding dim 0 over every mesh dimension in order is the row-major numbering.
                [Shard(0)] * mesh.ndim,
                run_check=False,
                shape=torch.Size((self.rows, row.numel())),
                stride=(row.numel(), 1),
            )
            for name, row in rows.items()
        }

    def own_rows(self, tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return this process's row of every table, see :meth:`own_row`; does not communicate.

        Args:
            tables: By name, shape ``(rows, n)`` each, as :meth:`tables` makes them.

        Returns:
            By name, shape ``(n,)`` each, on the CPU. They may share memory with ``tables``.

        Raises:
            RNGStateError: Something is no such table; the message names it.
        """
        rows = {}
        for name, table in tables.items():
            if not isinstance(table, torch.Tensor):
                raise RNGStateError(f"{name}: expected a tensor, found {type(table).__name__}")
            try:
                rows[name] = self.own_row(table)
            except ValueError as error:
                raise RNGStateError(f"{name}: {error}") from error
        return rows

    def own_row(self, table: torch.Tensor) -> torch.Tensor:
        """Return this process's row of a table, on the CPU; does not communicate.

        Args:
            table: Shape ``(rows, n)``: a DTensor as :meth:`tables` makes it, or a whole plain
                tensor (as ``dcp_to_torch_save`` writes it).

        Returns:
            Shape ``(n,)``. It may share memory with ``table``.

        Raises:
            ValueError: Another number of rows or dimensions, or a DTensor that does not hold
                exactly this process's row.
        """
        if table.ndim != 2 or table.shape[0] != self.rows:
            raise ValueError(
                f"the table has shape {tuple(table.shape)}, expected ({self.rows}, n). Another "
                "number of rows is for dcp.load with planner=RNGLoadPlanner()."
            )
        if table.is_meta or table.layout != torch.strided:
            raise ValueError(f"the table is {table.layout} on {table.device}, expected a dense one")
        if not isinstance(table, DTensor):
            return table[self.row].cpu()
        local = table.to_local()
        # A DTensor of another mesh or placement could hold some other row in the same shape.
        if Layout.current(table.device_mesh).row != self.row or local.shape[0] != 1:
            raise ValueError(
                f"the table is sharded as {table.placements} over {table.device_mesh}, "
                f"which does not place row {self.row} alone on rank {global_rank()}"
            )
        return local[0].cpu()


def row_major(coordinate: Sequence[int], shape: Sequence[int]) -> int:
    """Return the number of a coordinate of a mesh, the last dimension running fastest."""
    number = 0
    for index, size in zip(coordinate, shape, strict=True):
        number = number * size + index
    return number


def source_row(row: int, rows_saved: int) -> int:
    """Return the saved row that is loaded into row ``row``, of however many."""
    return row % rows_saved


def gather(numbers: torch.Tensor) -> torch.Tensor:
    """Return every rank's numbers; a collective of the default process group, one all-gather.

    Args:
        numbers: int64, shape ``(k,)``, on the CPU; the same k on every rank.

    Returns:
        int64, shape ``(world_size, k)``, on the CPU; row = global rank.
    """
    if not _has_process_group():
        return numbers.unsqueeze(0)
    # "cpu:gloo,cuda:nccl" or "cuda:nccl": a group that serves the CPU is used there.
    devices = [served.split(":")[0] for served in dist.get_backend_config().split(",")]
    device = "cpu" if "cpu" in devices else devices[0]
    everyone = [torch.empty_like(numbers, device=device) for _ in range(world_size())]
    dist.all_gather(everyone, numbers.to(device))
    return torch.stack(everyone).cpu()


def _mesh_of_all_ranks() -> DeviceMesh:
    """Return a mesh of the default process group, made anew: kept, it might outlive the group."""
    # Rows are CPU tensors and nothing here communicates, so the mesh is a CPU one whatever backend
    # the group has. init_device_mesh() would create a group of its own for some.
    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, "cpu")


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()
