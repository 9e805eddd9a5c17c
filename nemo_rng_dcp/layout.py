"""Which row is this process's, and how its record becomes part of a table that DCP stores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.record import KEY, Mesh, Record, records_in


def global_rank() -> int:
    """Return this process's global rank; does not communicate.

    The default process group decides. Before it exists, torchrun's ``RANK`` variable does, and
    without either the process is rank 0.

    Raises:
        ValueError: ``RANK`` is set but is no rank.
    """
    if dist.is_initialized():
        return dist.get_rank()
    value = os.environ.get("RANK", "0")
    if not value.isdecimal():
        raise ValueError(f"the environment variable RANK is {value!r}, expected an integer >= 0")
    return int(value)


def world_size() -> int:
    """Return the default process group's size, 1 without one; does not communicate."""
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass(frozen=True)
class Layout:
    """One row per coordinate of a mesh, numbered row-major.

    Attributes:
        row: The row that belongs to this process, ``0 <= row < rows``.
        rows: Rows of the table.
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
            row = dist.get_rank() if dist.is_initialized() else 0
            return cls(row, world_size(), None)
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"rank {global_rank()} is not in the mesh {mesh}, so it has no row")
        return cls(row_major(coordinate, mesh.shape), mesh.size(), mesh)

    @property
    def mesh_sizes(self) -> Mesh | None:
        """The names and sizes of the mesh's dimensions, as a record stores them."""
        if self.mesh is None:
            return None
        return tuple(zip(_names(self.mesh), self.mesh.shape, strict=True))

    def table(self, record: torch.Tensor) -> torch.Tensor:
        """Return the table of which ``record`` is this process's row; does not communicate.

        Args:
            record: Shape ``(length,)``, the same length on every rank.

        Returns:
            Shape ``(rows * length,)``: a DTensor sharded on dim 0, or ``record`` itself without a
            process group. DCP stores either as one chunk per row.
        """
        if self.mesh is None and not dist.is_initialized():
            return record
        mesh = _mesh_of_all_ranks() if self.mesh is None else _on_cpu(self.mesh)
        return DTensor.from_local(
            record,
            mesh,
            # Sharding dim 0 over every mesh dimension in order is the row-major numbering.
            [Shard(0)] * mesh.ndim,
            run_check=False,
            shape=torch.Size((self.rows * record.numel(),)),
            stride=(1,),
        )

    def own_record(self, table: torch.Tensor) -> Record:
        """Return the record in a table that is loaded into this process's row.

        Does not communicate.

        Args:
            table: A DTensor as :meth:`table` makes it; a plain tensor with the record alone (as
                ``RNGLoadPlanner`` leaves it), or with those of all rows (as ``dcp_to_torch_save``
                writes it).

        Raises:
            RNGStateError: It holds no record, an altered one, or another row's.
        """
        records = records_in(table.to_local() if isinstance(table, DTensor) else table)
        chosen = records[source_row(self.row, len(records))]
        record = Record.from_tensor(chosen)
        source = source_row(self.row, record.rows)
        if record.row != source:
            raise RNGStateError(
                f"{KEY}: row {self.row} of {self.rows} was given row {record.row} of "
                f"{record.rows}, expected row {source}. A state_dict() holds its own rank's row "
                "alone, also when one rank passes it to torch.save: save on all ranks with "
                "dcp.save or StatefulRNG.save(), and load with dcp.load or StatefulRNG.load()."
            )
        return record


def row_major(coordinate: Sequence[int], shape: Sequence[int]) -> int:
    """Return the number of a coordinate of a mesh, the last dimension running fastest."""
    number = 0
    for index, size in zip(coordinate, shape, strict=True):
        number = number * size + index
    return number


def source_row(row: int, rows_saved: int) -> int:
    """Return the saved row that is loaded into row ``row``, of however many."""
    return row % rows_saved


def _mesh_of_all_ranks() -> DeviceMesh:
    """Return a mesh of the default process group, made anew: kept, it might outlive the group."""
    # Rows are CPU tensors and nothing here communicates, so the mesh is a CPU one whatever backend
    # the group has. init_device_mesh() would create a group of its own for some.
    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, "cpu")


def _on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    """Return a CPU mesh of the same ranks over the same groups; creates no process group."""
    if mesh.device_type == "cpu":
        return mesh
    # DTensor would move a record to the mesh's device, and DCP back to write it.
    groups = mesh.get_all_groups()
    return DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=_names(mesh))


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or tuple(str(number) for number in range(mesh.ndim))
