"""Checkpoints for the command, made row by row in one process."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_rng_dcp.cli.streams import packed_after_seed
from nemo_rng_dcp.record import KEY, Record, Stream

GENERATORS = {"python": "python", "numpy": "numpy", "torch": "torch.cpu"}


def stream(kind: str, seed: int, shared: bool = False) -> Stream:
    """Return a stream that was just seeded."""
    state = packed_after_seed(kind, seed)
    assert state is not None
    return Stream(kind, shared, state)


def drawn_streams(row: int) -> dict[str, Stream]:
    """Return streams that differ between rows and are at no job's seed."""
    return {name: stream(kind, 2**40 + row) for name, kind in GENERATORS.items()}


def records(
    count: int, streams: Callable[[int], Mapping[str, Stream]] = drawn_streams, **fields: Any
) -> list[Record]:
    """Return ``count`` good records of one job."""
    known = {"world_size": count, "seed": 42, "ranked": True, "resizes": 0, "mesh": None}
    known |= {"rows": count, "taken_at": 10**18}
    return [Record(row=row, streams=streams(row), **{**known, **fields}) for row in range(count)]


def save(rows: Sequence[Record | torch.Tensor], path: Path, entry: str = "rng") -> Path:
    """Store records as a job of as many ranks would: a chunk for each."""
    tensors = [row.to_tensor() if isinstance(row, Record) else row for row in rows]
    # One process writes the rows under keys of their own; then they become parts of one tensor.
    dcp.save({str(row): its for row, its in enumerate(tensors)}, checkpoint_id=path, no_dist=True)
    key = f"{entry}.{KEY}" if entry else KEY
    length = len(tensors[0])

    def join(metadata: Any) -> None:
        offsets = [torch.Size([row * length]) for row in range(len(tensors))]
        properties = TensorProperties(dtype=torch.int64)
        chunks = [ChunkStorageMetadata(offset, torch.Size([length])) for offset in offsets]
        size = torch.Size([length * len(tensors)])
        metadata.state_dict_metadata = {key: TensorStorageMetadata(properties, size, chunks)}
        metadata.planner_data = {key: (*entry.split("."), KEY) if entry else (KEY,)}
        metadata.storage_data = {
            MetadataIndex(key, offsets[int(at.fqn)]): place
            for at, place in metadata.storage_data.items()
        }

    change_metadata(path, join)
    return path


def altered(record: Record, **fields: Any) -> Record:
    """Return a record with other numbers in it, whose check word fits."""
    return replace(record, **fields)


def change_metadata(path: Path, change: Callable[[Any], object]) -> None:
    """Rewrite a checkpoint's ``.metadata`` after ``change`` was applied to it."""
    file = path / ".metadata"
    metadata: Metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def place_of(path: Path, key: str, row: int = 0) -> tuple[Path, int, int]:
    """Return the file, the start and the length of a stored row."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    places = [place for at, place in metadata.storage_data.items() if at.fqn == key]
    return path / places[row].relative_path, places[row].offset, places[row].length
