"""The table of an RNG entry: which row is this process's, and how DCP stores and finds records.

A table is one int64 tensor of ``rows * length`` numbers: the records of all rows, one after the
other. DCP stores it as one chunk per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import ReadItem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.grids import Grid, base_of, is_name, names_of
from nemo_rng_dcp.ranks import world_size
from nemo_rng_dcp.record import KEY, LENGTH, ROWS, Mesh, Record, words_of


@dataclass(frozen=True)
class Rows:
    """One row per coordinate of a mesh, numbered row-major.

    Attributes:
        row: The row that belongs to this process, ``0 <= row < count``.
        count: Rows of the table.
        mesh: The mesh along which streams differ; ``None``: all ranks of the default process
            group, or no group at all.
        grid: Where the mesh lies; ``None`` without one.
    """

    row: int
    count: int
    mesh: DeviceMesh | None
    grid: Grid | None = None

    @classmethod
    def current(cls, mesh: DeviceMesh | None = None, grid: Grid | None = None) -> Rows:
        """Return the rows as of now; does not communicate and creates no process group.

        Args:
            mesh: The (sub)mesh along which streams differ, of any number of dimensions. Ranks of
                one coordinate share a row. ``None``: all ranks of the default process group, so
                that row = global rank; without a group, one row.
            grid: ``Grid.of(mesh)``, if it is known.

        Raises:
            ValueError: This process's rank is not in ``mesh``.
            RuntimeError: ``mesh`` is older than the process group, whose ranks have other numbers.
        """
        if mesh is None:
            row = dist.get_rank() if dist.is_initialized() else 0
            return cls(row, world_size(), None)
        grid = Grid.of(mesh) if grid is None else grid
        if dist.is_initialized() and (grid.rank != dist.get_rank() or grid.highest >= world_size()):
            raise RuntimeError(
                f"the mesh {mesh} was made when this process was rank {grid.rank}, and has ranks "
                f"up to {grid.highest}; now it is rank {dist.get_rank()} of {world_size()}. Its "
                "rows are those of an earlier process group: make the mesh, and then StatefulRNG, "
                "after init_process_group"
            )
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        return cls(row_major(coordinate, mesh.shape), mesh.size(), mesh, grid)

    @property
    def key(self) -> str:
        """The key of the table in the state dict of a ``StatefulRNG``."""
        return KEY if self.grid is None else self.grid.key

    @property
    def parts(self) -> Mesh | None:
        """The dimensions that a flattened mesh is made of, as a record stores them."""
        return None if self.grid is None else self.grid.parts

    @property
    def mesh_sizes(self) -> Mesh | None:
        """The names and sizes of the mesh's dimensions, as a record stores them."""
        if self.mesh is None:
            return None
        return tuple(zip(names_of(self.mesh), self.mesh.shape, strict=True))

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
        return _sharded(record, mesh, self.count)

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
        records = records_in(local(table))
        chosen = records[source_row(self.row, len(records))]
        record = Record.from_tensor(chosen)
        source = source_row(self.row, record.rows)
        if record.row != source:
            raise RNGStateError(
                f"{KEY}: row {self.row} of {self.count} was given row {record.row} of "
                f"{record.rows}, expected row {source}. A state_dict() holds its own rank's row "
                "alone, also when one rank passes it to torch.save: save on all ranks with "
                "dcp.save or StatefulRNG.save(), and load with dcp.load or StatefulRNG.load()."
            )
        return record


def with_record(table: torch.Tensor, record: torch.Tensor) -> torch.Tensor:
    """Return a table on the ranks of another one, with another record as this process's row.

    Args:
        table: As :meth:`Rows.table` makes it; it stays as it is.
        record: Shape ``(length,)``, of any length that is the same on every rank; not copied.
    """
    if not isinstance(table, DTensor):
        return record
    return _sharded(record, table.device_mesh, table.numel() // local(table).numel())


def local(table: torch.Tensor) -> torch.Tensor:
    """Return what this process has of a table; a plain one has all that there is."""
    return table.to_local() if isinstance(table, DTensor) else table


def row_major(coordinate: Sequence[int], shape: Sequence[int]) -> int:
    """Return the number of a coordinate of a mesh, the last dimension running fastest."""
    number = 0
    for index, size in zip(coordinate, shape, strict=True):
        number = number * size + index
    return number


def source_row(row: int, rows_saved: int) -> int:
    """Return the saved row that is loaded into row ``row``, of however many."""
    return row % rows_saved


def records_in(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the records that stand one after the other in a tensor, unread.

    Args:
        tensor: One record, or all of a table, in the order of the rows.

    Raises:
        RNGStateError: It is neither.
    """
    words = words_of(tensor)
    if len(words) > ROWS and 0 < words[LENGTH] < len(words):
        length, rows = int(words[LENGTH]), int(words[ROWS])
        if length * rows == len(words):
            return list(torch.split(tensor, length))
    return [tensor]


def is_record(key: str, dtype: object, size: Sequence[int], name: str = KEY) -> bool:
    """Return whether a load takes what a checkpoint has under a key for records.

    Args:
        key: The key in the checkpoint.
        dtype: The tensor's data type; ``None``, for example, where no tensor is stored.
        size: The tensor's shape.
        name: The last part of their keys, without a grid.
    """
    return is_name(key.rpartition(".")[2], name) and dtype == torch.int64 and len(size) == 1


def record_keys(saved: Mapping[str, Any], name: str = KEY) -> list[str]:
    """Return the keys under which a checkpoint's metadata lists records; see :func:`is_record`."""
    return [
        key
        for key, stored in saved.items()
        if isinstance(stored, TensorStorageMetadata)
        and is_record(key, stored.properties.dtype, stored.size, name)
    ]


def read_of_row(key: str, row: int, saved: Any, entry: str | None = None) -> ReadItem:
    """Return the read of the saved record that is loaded into a row.

    Args:
        key: The record's key in the checkpoint.
        row: The row of the job that loads.
        saved: What the checkpoint's metadata has under that key.
        entry: The key of what is loaded, if it is another one.

    Raises:
        RNGStateError: No record is there, or none for the row.
    """
    if not isinstance(saved, TensorStorageMetadata):
        raise RNGStateError(
            f"{key}: the checkpoint holds bytes (a pickle) here, expected a tensor. No StatefulRNG "
            "wrote that; it was not read. Load without RNG state, or another checkpoint."
        )
    is_one = is_record(key, saved.properties.dtype, saved.size, base_of(key))
    if not is_one or not saved.chunks or not all(saved.chunks[0].sizes):
        raise RNGStateError(
            f"{key}: the checkpoint holds {saved.properties.dtype} {tuple(saved.size)} in "
            f"{len(saved.chunks)} chunks, expected torch.int64 (rows * length,) in one chunk per "
            "row. No StatefulRNG wrote that."
        )
    # One chunk alone is one row, or all of them (as torch_save_to_dcp writes it): StatefulRNG
    # chooses then, as a record tells how many there are.
    length = saved.chunks[0].sizes[0]
    place = torch.Size((source_row(row, saved.size[0] // length) * length,))
    for number, chunk in enumerate(saved.chunks):
        if chunk.offsets == place and chunk.sizes == (length,):
            return ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(key if entry is None else entry, torch.Size((0,))),
                dest_offsets=torch.Size((0,)),
                storage_index=MetadataIndex(key, chunk.offsets, number),
                storage_offsets=torch.Size((0,)),
                lengths=torch.Size((length,)),
            )
    raise RNGStateError(
        f"{key}: the checkpoint's metadata has no chunk of {length} numbers at {place[0]}, for row "
        f"{row}. It was saved by fewer ranks than it has rows, or is damaged."
    )


def _sharded(record: torch.Tensor, mesh: DeviceMesh, count: int) -> DTensor:
    return DTensor.from_local(
        record,
        mesh,
        # Sharding dim 0 over every mesh dimension in order is the row-major numbering.
        [Shard(0)] * mesh.ndim,
        run_check=False,
        shape=torch.Size((count * record.numel(),)),
        stride=(1,),
    )


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
    return DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=names_of(mesh))
