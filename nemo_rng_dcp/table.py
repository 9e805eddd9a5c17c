"""The table of an RNG entry: which row is this process's, and how DCP stores and finds records.

A table is one int64 tensor of ``rows * length`` numbers: the records of all rows, one after the
other. DCP stores it as one chunk per coordinate of the mesh along which streams differ: a row each,
or as many rows as there are logical ranks for one process.
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
from nemo_rng_dcp.ranks import global_rank, world_size
from nemo_rng_dcp.record import KEY, LENGTH, ROW, ROWS, Mesh, Record, mesh_text, words_of

NOT_SAVED = torch.empty(0, dtype=torch.int64)
"""Stands for a record that a checkpoint does not have."""


@dataclass(frozen=True)
class Rows:
    """As many rows for each coordinate of a mesh, numbered row-major; one each in a plain job.

    Attributes:
        own: The rows that belong to this process, at least one.
        count: Rows of the table, ``own.stop <= count``.
        mesh: The mesh along which streams differ; ``None``: all ranks of the default process
            group, or no group at all.
    """

    own: range
    count: int
    mesh: DeviceMesh | None

    @classmethod
    def current(cls, mesh: DeviceMesh | None = None, logical_ranks: int | None = None) -> Rows:
        """Return the rows as of now; does not communicate and creates no process group.

        Args:
            mesh: The (sub)mesh along which streams differ, of any number of dimensions. Ranks of
                one coordinate share a row. ``None``: all ranks of the default process group, so
                that row = global rank; without a group, one row.
            logical_ranks: Rows of the table; ``None``: one per coordinate.

        Raises:
            ValueError: This process's rank is not in ``mesh``, or the coordinates cannot have
                equally many of ``logical_ranks`` rows.
        """
        if mesh is None:
            number, size = dist.get_rank() if dist.is_initialized() else 0, world_size()
        else:
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                raise ValueError(
                    f"rank {global_rank()} is not in the mesh {mesh}, so it has no row"
                )
            number, size = row_major(coordinate, mesh.shape), mesh.size()
        count = size if logical_ranks is None else logical_ranks
        if count % size:
            among = (
                "processes"
                if mesh is None
                else f"coordinates of the mesh ({mesh_text(_sizes(mesh))})"
            )
            fitting = [str(n) for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"logical_ranks={count} cannot be shared out evenly among {size} {among}: start "
                f"{', '.join(fitting)} of them, or state a logical_ranks that {size} divides. "
                "Another number of logical ranks is another run"
            )
        each = count // size
        return cls(range(number * each, (number + 1) * each), count, mesh)

    @property
    def row(self) -> int:
        """The first row of this process."""
        return self.own.start

    @property
    def mesh_sizes(self) -> Mesh | None:
        """The names and sizes of the mesh's dimensions, as a record stores them."""
        return None if self.mesh is None else _sizes(self.mesh)

    def table(self, records: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the table of which ``records`` are this process's rows; does not communicate.

        Args:
            records: In the order of the rows, each of shape ``(length,)``, the same length on every
                rank.

        Returns:
            Shape ``(rows * length,)``: a DTensor sharded on dim 0, or a plain tensor without a
            process group. DCP stores either as one chunk per process.
        """
        local = records[0] if len(records) == 1 else torch.cat(list(records))
        if self.mesh is None and not dist.is_initialized():
            return local
        mesh = _mesh_of_all_ranks() if self.mesh is None else _on_cpu(self.mesh)
        return DTensor.from_local(
            local,
            mesh,
            # Sharding dim 0 over every mesh dimension in order is the row-major numbering.
            [Shard(0)] * mesh.ndim,
            run_check=False,
            shape=torch.Size((self.count * records[0].numel(),)),
            stride=(1,),
        )

    def own_records(self, table: torch.Tensor) -> dict[int, Record]:
        """Return by row the records in a table that are loaded into this process's rows.

        Does not communicate.

        Args:
            table: A DTensor as :meth:`table` makes it; a plain tensor with the records that a
                process needs (as ``RNGLoadPlanner`` leaves it), or with those of all rows (as
                ``dcp_to_torch_save`` writes it).

        Raises:
            RNGStateError: It holds no record, an altered one, or not this process's.
        """
        tensors = records_in(table.to_local() if isinstance(table, DTensor) else table)
        heads = [words_of(tensor)[: ROWS + 1].tolist() for tensor in tensors]
        by_row = {
            head[ROW]: tensor for head, tensor in zip(heads, tensors, strict=True) if head[ROW:]
        }
        own: dict[int, Record] = {}
        for row in self.own:
            # Where a head is damaged, the place in the tensor tells which record it is.
            source = source_row(row, max(heads[0][-1], 1))
            tensor = by_row.get(source, tensors[source_row(row, len(tensors))])
            record = own[row] = Record.from_tensor(tensor)
            source = source_row(row, record.rows)
            if record.row != source:
                raise RNGStateError(
                    f"{KEY}: row {row} of {self.count} was given row {record.row} of "
                    f"{record.rows}, expected row {source}. A state_dict() holds its own rank's "
                    "rows alone, also when one rank passes it to torch.save: save on all ranks "
                    "with dcp.save or StatefulRNG.save(), and load with dcp.load or "
                    "StatefulRNG.load()."
                )
        return own


def row_major(coordinate: Sequence[int], shape: Sequence[int]) -> int:
    """Return the number of a coordinate of a mesh, the last dimension running fastest."""
    number = 0
    for index, size in zip(coordinate, shape, strict=True):
        number = number * size + index
    return number


def rows_text(rows: range) -> str:
    """Return "row 3" or "rows 4 to 7"."""
    return f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"


def source_row(row: int, rows_saved: int) -> int:
    """Return the saved row that is loaded into row ``row``, of however many."""
    return row % rows_saved


def records_in(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the records that stand one after the other in a tensor, unread.

    Args:
        tensor: Some or all of a table's records.

    Raises:
        RNGStateError: It cannot be that.
    """
    words = words_of(tensor)
    length = int(words[LENGTH]) if len(words) > LENGTH else 0
    # What is too short to be a record is not cut up: whoever reads it says what it is.
    if ROWS < length < len(words) and len(words) % length == 0:
        return list(torch.split(tensor, length))
    return [tensor]


def is_record(key: str, dtype: object, size: Sequence[int]) -> bool:
    """Return whether a load takes what a checkpoint has under a key for records.

    Args:
        key: The key in the checkpoint.
        dtype: The tensor's data type; ``None``, for example, where no tensor is stored.
        size: The tensor's shape.
    """
    return key.rpartition(".")[2] == KEY and dtype == torch.int64 and len(size) == 1


def record_keys(saved: Mapping[str, Any]) -> list[str]:
    """Return the keys under which a checkpoint's metadata lists records."""
    return [
        key
        for key, stored in saved.items()
        if isinstance(stored, TensorStorageMetadata)
        and is_record(key, stored.properties.dtype, stored.size)
    ]


def reads_of_rows(key: str, live: torch.Tensor, saved: Any) -> list[ReadItem]:
    """Return the reads of the saved records that are loaded into this process's rows.

    Chunks are read whole, one after the other into one tensor: it begins with a record, and so does
    every chunk in it. More chunks than needed may be among them, see ``Rows.own_records``.

    Args:
        key: The record's key in the checkpoint.
        live: This process's part of the table of the job that loads.
        saved: What the checkpoint's metadata has under that key.

    Raises:
        RNGStateError: No record is there, or none for a row.
    """
    if not isinstance(saved, TensorStorageMetadata):
        raise RNGStateError(
            f"{key}: the checkpoint holds bytes (a pickle) here, expected a tensor. No StatefulRNG "
            "wrote that; it was not read. Load without RNG state, or another checkpoint."
        )
    is_one = is_record(key, saved.properties.dtype, saved.size)
    if not is_one or not saved.chunks or not all(saved.chunks[0].sizes):
        raise RNGStateError(
            f"{key}: the checkpoint holds {saved.properties.dtype} {tuple(saved.size)} in "
            f"{len(saved.chunks)} chunks, expected torch.int64 (rows * length,) in chunks of whole "
            "rows. No StatefulRNG wrote that."
        )
    words = words_of(live)
    length, first, rows = (int(words[place]) for place in (LENGTH, ROW, ROWS))
    # One chunk alone is one row, or all of them (as torch_save_to_dcp writes it).
    size, total = saved.chunks[0].sizes[0], saved.size[0]
    chunks = max(total // size, 1)
    by_length, rest = divmod(total, length)
    # How many rows were saved, only the records themselves tell. The same generators have records
    # of the same length. Otherwise a chunk is one row, or there are as many rows as now.
    is_known = by_length and not rest and not by_length % chunks
    counts = {by_length} if is_known else {chunks, rows}
    wanted = {
        source_row(row, count) * chunks // count: row
        for count in counts
        for row in range(first, first + len(words) // length)
        if not count % chunks
    }
    by_offset = {chunk.offsets: (n, chunk) for n, chunk in enumerate(saved.chunks)}
    reads: list[ReadItem] = []
    for number, row in sorted(wanted.items()):
        index, chunk = by_offset.get(torch.Size((number * size,)), (0, None))
        if chunk is None or chunk.sizes != (size,):
            raise RNGStateError(
                f"{key}: the checkpoint's metadata has no chunk of {size} numbers at "
                f"{number * size}, for row {row}. It was saved by fewer ranks than it has rows, or "
                "is damaged."
            )
        reads.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(key, torch.Size((0,))),
                dest_offsets=torch.Size((len(reads) * size,)),
                storage_index=MetadataIndex(key, chunk.offsets, index),
                storage_offsets=torch.Size((0,)),
                lengths=torch.Size((size,)),
            )
        )
    return reads


def buffer_for(reads: Sequence[ReadItem]) -> torch.Tensor:
    """Return a tensor of zeros for what is read; ``NOT_SAVED`` for nothing."""
    size = sum(read.lengths[0] for read in reads)
    return torch.zeros(size, dtype=torch.int64) if size else NOT_SAVED


def place_in(buffer: torch.Tensor, read: ReadItem) -> torch.Tensor:
    """Return the part of a buffer that a read fills."""
    return buffer.narrow(0, read.dest_offsets[0], read.lengths[0])


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


def _sizes(mesh: DeviceMesh) -> Mesh:
    return tuple(zip(_names(mesh), mesh.shape, strict=True))


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or tuple(str(number) for number in range(mesh.ndim))
