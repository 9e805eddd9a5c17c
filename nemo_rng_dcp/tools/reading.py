"""The RNG tables of a checkpoint on disk: one process, no GPU, nothing executed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.origin import ORIGIN, Origin
from nemo_rng_dcp.tools.metadata import CheckpointMetadata, Chunk, Stored

Progress = Callable[[int, int], None]
"""Is told how many parts were read so far, and of how many."""

ROW_LIMIT = 2**20
"""A table of more rows is taken for a mistake: no job has so many ranks."""

_ORDER = (ORIGIN, "python", "numpy", "torch")
_ORIGIN_WIDTH = len(fields(Origin)) + 1
# torch.save writes a zip archive around the numbers; its parts are padded to 64 bytes.
_ARCHIVE_BYTES = 2**16


@dataclass
class Table:
    """The rows of one table that could be read, and why the others could not.

    Attributes:
        width: Elements of a row, its check word included.
        rows: By row number, int64, shape ``(width,)``.
        failures: By row number, the reason.
    """

    width: int
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


@dataclass
class Entry:
    """The tables that one ``StatefulRNG`` stored.

    Attributes:
        key: The dotted path of the entry, "" at the top level of the checkpoint.
        count: Rows of every table, by the metadata.
        tables: By name; ``origin`` is the first.
    """

    key: str
    count: int
    tables: dict[str, Table]


def find_entries(metadata: CheckpointMetadata) -> dict[str, list[str]]:
    """Return the tables' names by the path of their entry, wherever entries are nested.

    An entry is a table ``origin`` as ``StatefulRNG`` stores it, or a wider one of a later version,
    and tables of as many rows directly beside it.
    """
    entries = {}
    for fqn, stored in metadata.keys.items():
        path, _, name = fqn.rpartition(".")
        if name != ORIGIN or not _is_table(stored) or stored.size[1] < _ORIGIN_WIDTH:
            continue
        prefix = f"{path}." if path else ""
        beside = [
            other.removeprefix(prefix)
            for other, its in metadata.keys.items()
            if other.startswith(prefix)
            and other.removeprefix(prefix).isidentifier()
            and _is_table(its)
            and its.size[0] == stored.size[0]
        ]
        if len(beside) > 1:
            known = [name for name in _ORDER if name in beside]
            entries[path] = known + sorted(set(beside).difference(known))
    return entries


def read_entries(
    folder: Path, metadata: CheckpointMetadata, progress: Progress = lambda *_: None
) -> list[Entry]:
    """Read every RNG table of a checkpoint; does not communicate.

    Args:
        folder: The checkpoint.
        metadata: Its metadata.
        progress: Called after every part that was read.

    Raises:
        RNGStateError: Not one row of an entry can be read, or its metadata makes no sense. A row
            that cannot be read beside others that can is in the table's ``failures``.
    """
    found = find_entries(metadata)
    fqns = {(key, name): f"{key}.{name}" if key else name for key in found for name in found[key]}
    chunks = metadata.chunks(set(fqns.values()))
    total, done = sum(map(len, chunks.values())), 0
    entries = []
    with _plain_tensors_only():
        for key, names in found.items():
            tables = {}
            for name in names:
                fqn = fqns[key, name]
                stored = metadata.keys[fqn]
                table = Table(stored.size[1])
                for chunk in chunks[fqn]:
                    _read_rows(folder, fqn, stored, chunk, table)
                    done += 1
                    progress(done, total)
                tables[name] = table
            reasons = [reason for table in tables.values() for reason in table.failures.values()]
            if reasons and not any(table.rows for table in tables.values()):
                raise RNGStateError(f"{folder}: no RNG state can be read: {reasons[0]}")
            entries.append(Entry(key, metadata.keys[fqns[key, ORIGIN]].size[0], tables))
    return entries


def _is_table(stored: Stored) -> bool:
    return stored.dtype == torch.int64 and len(stored.size) == 2


def _read_rows(folder: Path, fqn: str, stored: Stored, chunk: Chunk, table: Table) -> None:
    """Read one chunk of rows into ``table``, or the reason why not."""
    if len(chunk.offsets) != 2 or len(chunk.sizes) != 2:
        raise RNGStateError(f"{fqn}: a chunk of a table has {len(chunk.sizes)} dimensions")
    first, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
    if end > stored.size[0] or end > ROW_LIMIT:
        raise RNGStateError(f"{fqn}: a chunk ends at row {end} of {stored.size[0]}")
    try:
        if (chunk.offsets[1], chunk.sizes[1]) != (0, table.width):
            raise ValueError(f"it is split within a row at element {chunk.offsets[1]}")
        content = _read_tensor(folder, chunk)
    except (OSError, ValueError) as error:
        table.failures.update(dict.fromkeys(range(first, end), str(error)))
    else:
        table.rows.update(zip(range(first, end), content, strict=True))


def _read_tensor(folder: Path, chunk: Chunk) -> torch.Tensor:
    """Return the int64 tensor that a chunk's bytes hold.

    Raises:
        OSError: The file cannot be read.
        ValueError: The bytes are not there, or are no such tensor.
    """
    name = chunk.file
    if not name:
        raise ValueError("the metadata names no file for it")
    # Anything else would let a checkpoint make its reader open other files of this machine.
    if Path(name).name != name or "\\" in name or name == "..":
        raise ValueError(f"refused: its file {name!r:.60} is outside the checkpoint")
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{name} is missing")
    present, end = file.stat().st_size, chunk.start + chunk.length
    if end > present:
        raise ValueError(f"{name} is truncated: {present} bytes, expected {end} or more")
    if chunk.encoded:
        raise ValueError(f"{name} was written by a storage extension (compression?) of DCP's")
    expected = 8 * chunk.sizes[0] * chunk.sizes[1]
    # Fewer bytes would be a compressed archive, of which a few can stand for all of the memory.
    if not expected <= chunk.length <= expected + _ARCHIVE_BYTES:
        raise ValueError(f"{name} has {chunk.length} bytes for {chunk.sizes} numbers of 8 bytes")
    with file.open("rb") as content:
        content.seek(chunk.start)
        stored = io.BytesIO(content.read(chunk.length))
    try:
        tensor = torch.load(stored, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever torch runs into
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise ValueError(f"refused: {name} holds something else than a tensor") from error
        raise ValueError(f"{name} is damaged at byte {chunk.start}") from error
    if type(tensor) is not torch.Tensor:
        raise ValueError(f"refused: {name} holds a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype != torch.int64 or tensor.shape != chunk.sizes:
        raise ValueError(
            f"{name} holds {tensor.dtype} {tuple(tensor.shape)}, expected int64 {chunk.sizes}"
        )
    # A sparse or an expanded tensor would only become large when it is looked at.
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"refused: {name} holds no plain tensor")
    return tensor


@contextmanager
def _plain_tensors_only() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` build nothing but torch's own tensors.

    torch itself, or the program around, may have added more classes to what it may build, such as
    DTensor, and building them runs their code.
    """
    admitted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(admitted)
