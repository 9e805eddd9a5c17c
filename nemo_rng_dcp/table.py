"""The table of an RNG entry: which row is this process's, and how DCP stores and finds records.

A table is one int64 tensor of ``rows * length`` numbers: the records of all rows, one after the
other. DCP stores it as one chunk per coordinate of the mesh along which streams differ: a row each,
or as many rows as there are logical ranks for one process.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import ReadItem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.grids import Grid, names_of
from nemo_rng_dcp.keys import base_of, is_record
from nemo_rng_dcp.ranks import world_size
from nemo_rng_dcp.record import KEY, LENGTH, ROW, ROWS, Mesh, Record, mesh_text, words_of

_SHORTEST_RECORD = 16
"""A head of 14 numbers, contents and a check word."""


@dataclass(frozen=True)
class Rows:
    """As many rows for each coordinate of a mesh, numbered row-major; one each in a plain job.

    Attributes:
        own: The rows that belong to this process, at least one.
        count: Rows of the table, ``own.stop <= count``.
        mesh: The mesh along which streams differ; ``None``: all ranks of the default process
            group, or no group at all.
        grid: Where the mesh lies; ``None`` without one.
    """

    own: range
    count: int
    mesh: DeviceMesh | None
    grid: Grid | None = None

    @classmethod
    def current(
        cls,
        mesh: DeviceMesh | None,
        grid: Grid | None,
        logical_ranks: int | None = None,
    ) -> Rows:
        """Return the rows as of now; does not communicate and creates no process group.

        Args:
            mesh: The (sub)mesh along which streams differ, of any number of dimensions. Ranks of
                one coordinate share a row. ``None``: all ranks of the default process group, so
                that row = global rank; without a group, one row.
            grid: ``Grid.of(mesh)``; ``None`` without a mesh.
            logical_ranks: Rows of the table; ``None``: one per coordinate.

        Raises:
            ValueError: The coordinates cannot have equally many of ``logical_ranks`` rows.
            RuntimeError: ``mesh`` is older than the process group, whose ranks have other numbers.
        """
        if mesh is None:
            number, size = dist.get_rank() if dist.is_initialized() else 0, world_size()
            return cls(*_shared_out(number, size, logical_ranks, "processes"), None)
        assert grid is not None
        if dist.is_initialized() and (grid.rank != dist.get_rank() or grid.highest >= world_size()):
            raise RuntimeError(
                f"the mesh {mesh} was made when this process was rank {grid.rank}, and has ranks "
                f"up to {grid.highest}; now it is rank {dist.get_rank()} of {world_size()}. Its "
                "rows are those of an earlier process group: make the mesh, and then StatefulRNG, "
                "after init_process_group"
            )
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        number = int(np.ravel_multi_index(coordinate, mesh.shape))
        among = f"coordinates of the mesh ({mesh_text(_sizes(mesh))})"
        own, count = _shared_out(number, mesh.size(), logical_ranks, among)
        return cls(own, count, mesh, grid)

    @property
    def row(self) -> int:
        """The first row of this process."""
        return self.own.start

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
        own = joined(records)
        if self.mesh is None and not dist.is_initialized():
            return own
        mesh = _mesh_of_all_ranks() if self.grid is None else self.grid.on_cpu
        return _sharded(own, mesh)

    def own_records(self, table: torch.Tensor) -> dict[int, Record]:
        """Return by row the records in a table that are loaded into this process's rows.

        Does not communicate.

        Args:
            table: A DTensor as :meth:`table` makes it; or a plain tensor with the records that a
                process needs, more of them, or those of all rows (as ``dcp_to_torch_save`` writes
                it).

        Raises:
            RNGStateError: It holds no record, an altered one, or not this process's.
        """
        tensors = records_in(local(table))
        heads = [words_of(tensor) for tensor in tensors if len(tensors) > 1]
        places = {head[ROW]: place for place, head in reversed([*enumerate(heads)])}
        own: dict[int, Record] = {}
        for row in self.own:
            # Where a head is damaged, the place in the tensor tells which record it is.
            place = source_row(row, len(tensors))
            if heads:
                source = source_row(row, max(heads[0][ROWS], 1))
                if heads[place][ROW] != source:
                    place = places.get(source, place)
            record = own[row] = Record.from_tensor(tensors[place])
            source = source_row(row, record.rows)
            if record.row != source:
                raise RNGStateError(
                    f"{KEY}: row {row} of {self.count} was given row {record.row} of "
                    f"{record.rows}, expected row {source}. A state_dict() holds its own rank's "
                    "rows alone, also when one rank passes it to torch.save: save on all ranks "
                    "with dcp.save or StatefulRNG.save(), and load with dcp.load or "
                    "StatefulRNG.load(). Where peers share a file, as the tensor-parallel ranks "
                    "of a dp rank, give StatefulRNG the mesh along which files differ: "
                    'mesh=mesh["dp"].'
                )
        return own


def with_records(table: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    """Return a table on the ranks of another one, with other records as this process's rows.

    Args:
        table: As :meth:`Rows.table` makes it; it stays as it is.
        records: One after the other, of any length that is the same on every rank; not copied.
    """
    return _sharded(records, table.device_mesh) if isinstance(table, DTensor) else records


def joined(records: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return records one after the other in one tensor."""
    return torch.cat(list(records))


def local(table: torch.Tensor) -> torch.Tensor:
    """Return what this process has of a table; a plain one has all that there is."""
    if not isinstance(table, DTensor):
        return table
    with torch.no_grad():  # three times as fast: no graph for what has no gradient
        return table.to_local()


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
    length = int(words[LENGTH]) if len(words) > LENGTH else len(words)
    # What is too short to be a record is not cut up: whoever reads it says what it is.
    if length > ROWS and len(words) % length == 0:
        return list(torch.split(tensor, length))
    return [tensor]


def record_keys(saved: Mapping[str, Any], name: str = KEY) -> list[str]:
    """Return the keys under which a checkpoint's metadata lists records; see :func:`is_record`."""
    return [
        key
        for key, stored in saved.items()
        if isinstance(stored, TensorStorageMetadata)
        and is_record(key, stored.properties.dtype, stored.size, name)
    ]


class Wanted(NamedTuple):
    """The rows that a process loads.

    Attributes:
        own: The rows.
        length: Numbers in a record of the job's; 0: unknown.
    """

    own: range
    length: int = 0

    @classmethod
    def of(cls, table: torch.Tensor) -> Wanted:
        """Return it for a job with this table, which is a good one."""
        words = words_of(local(table))
        length, row = int(words[LENGTH]), int(words[ROW])
        return cls(range(row, row + len(words) // length), length)


def reads_of_rows(key: str, wanted: Wanted, saved: Any, entry: str | None = None) -> list[ReadItem]:
    """Return the reads of the saved records that are loaded into some rows.

    They fill one tensor, see :func:`buffer_for`.

    Args:
        key: The record's key in the checkpoint.
        wanted: The rows of the job that loads.
        saved: What the checkpoint's metadata has under that key.
        entry: The key of what is loaded, if it is another one.

    Raises:
        RNGStateError: No record is there, or none for a row.
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
            f"{len(saved.chunks)} chunks, expected torch.int64 (rows * length,) in chunks of whole "
            "rows. No StatefulRNG wrote that."
        )
    chunks, size = saved.chunks, saved.chunks[0].sizes[0]
    by_place: dict[torch.Size, int] = {}
    reads: list[ReadItem] = []
    filled = 0
    for row, place, length in _places(wanted, saved.size[0], size):
        start = place // size * size
        number = start // size
        # Mostly they are in the order of the rows, and there may be as many as ranks.
        if number >= len(chunks) or chunks[number].offsets != (start,):
            by_place = by_place or {chunk.offsets: n for n, chunk in enumerate(chunks)}
            number = by_place.get(torch.Size((start,)), len(chunks))
        if number == len(chunks) or chunks[number].sizes != (size,):
            raise RNGStateError(
                f"{key}: the checkpoint's metadata has no chunk of {size} numbers at {start}, for "
                f"row {row}. It was saved by fewer ranks than it has rows, or is damaged."
            )
        reads.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(key if entry is None else entry, torch.Size((0,))),
                dest_offsets=torch.Size((filled,)),
                storage_index=MetadataIndex(key, chunks[number].offsets, number),
                storage_offsets=torch.Size((place - start,)),
                lengths=torch.Size((length,)),
            )
        )
        filled += length
    return reads


def _places(wanted: Wanted, total: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield a row, the place of what is read for it, and how much that is.

    How many rows were saved, only the records themselves tell. A job of the same generators has
    records of the same length, and each row's own is read. Otherwise whole chunks are, which begin
    with a record: those that have the rows, for every number of records that a chunk can hold.

    Args:
        wanted: The rows of the job that loads.
        total: Numbers in the table that was saved.
        size: Numbers in each of its chunks.
    """
    chunks = max(total // size, 1)
    count, rest = divmod(total, wanted.length) if wanted.length else (0, 0)
    per, uneven = divmod(count, chunks)
    if count and not rest and not uneven:
        row, sources = wanted.own[0], [source_row(row, count) for row in wanted.own]
        # Rows that stand together in a chunk are one read: each read opens the chunk.
        starts = [n for n, s in enumerate(sources) if not n or not s % per]
        for first, end in pairwise([*starts, len(sources)]):
            yield row + first, sources[first] * wanted.length, (end - first) * wanted.length
        return
    per_chunk = [n for n in range(1, size // _SHORTEST_RECORD + 1) if size % n == 0] or [1]
    by_chunk = {source_row(row, chunks * n) // n: row for n in per_chunk for row in wanted.own}
    for chunk, row in sorted(by_chunk.items()):
        yield row, chunk * size, size


def buffer_for(reads: Sequence[ReadItem]) -> torch.Tensor:
    """Return a tensor of zeros for what is read."""
    size = sum(read.lengths[0] for read in reads)
    return torch.zeros(size, dtype=torch.int64, device="cpu")


def place_in(buffer: torch.Tensor, read: ReadItem) -> torch.Tensor:
    """Return the part of a buffer that a read fills."""
    return buffer.narrow(0, read.dest_offsets[0], read.lengths[0])


def _sharded(records: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(
        records,
        mesh,
        # Sharding dim 0 over every mesh dimension in order is the row-major numbering.
        [Shard(0)] * mesh.ndim,
        shape=torch.Size((mesh.size() * records.numel(),)),
        stride=(1,),
    )


def _shared_out(number: int, size: int, logical_ranks: int | None, among: str) -> tuple[range, int]:
    """Return the rows of one of ``size`` coordinates or processes, and how many there are in all.

    Raises:
        ValueError: They cannot be shared out evenly.
    """
    count = size if logical_ranks is None else logical_ranks
    if count % size:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ValueError(
            f"logical_ranks={count} cannot be shared out evenly among {size} {among}: start "
            f"{fitting} of them, or state a logical_ranks that {size} divides. Another number of "
            "logical ranks is another run"
        )
    each = count // size
    return range(number * each, (number + 1) * each), count


def _sizes(mesh: DeviceMesh) -> Mesh:
    return tuple((name, mesh.size(dim)) for dim, name in enumerate(names_of(mesh)))


_kept: tuple[Callable[[], object], DeviceMesh] | None = None
"""The process group that :func:`_mesh_of_all_ranks` made a mesh of last, weakly, and the mesh."""


def _mesh_of_all_ranks() -> DeviceMesh:
    """Return a mesh of the default process group, the same one while there is that group."""
    global _kept
    world, kept = dist.group.WORLD, _kept
    assert world is not None
    if kept is None or kept[0]() is not world:
        # Rows are CPU tensors and nothing here communicates, so the mesh is a CPU one whatever
        # backend the group has. init_device_mesh() would create a group of its own for some.
        mesh = DeviceMesh.from_group(world, "cpu")
        # From torch 2.11 on it holds its groups by themselves too, which would keep a destroyed
        # one alive. Without them, it asks for a group by name.
        getattr(mesh, "_pg_registry", {}).clear()
        kept = _kept = weakref.ref(world), mesh
    return kept[1]
