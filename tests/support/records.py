"""Records made for tests, records with other fields, and checkpoints of them, in one process."""

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
from torch.distributed.tensor import DTensor

from nemo_rng_dcp.cli.streams import packed_after_seed
from nemo_rng_dcp.record import KEY, Record, Stream

State = Mapping[str, torch.Tensor]

GENERATORS = {"python": "python", "numpy": "numpy", "torch": "torch.cpu"}

RECORD = Record(
    row=3,
    rows=8,
    world_size=16,
    seed=42,
    ranked=True,
    resizes=2,
    taken_at=1_780_000_000_123_456_789,
    mesh=(("dp", 4), ("pp", 2)),
    streams={"python": Stream("python", False, b"12345"), "order": Stream("x", True, b"\xff" * 8)},
    python_version=3011007,
    numpy_version=2004006,
    torch_version=2013000,
    library_version=1000,
    hash_seed="random",
)
"""A record that never changes: what it is on disk is layout 1."""


def stream(kind: str, seed: int, shared: bool = False) -> Stream:
    """Return a stream that was just seeded."""
    state = packed_after_seed(kind, seed)
    assert state is not None
    return Stream(kind, shared, state)


def drawn_streams(row: int) -> dict[str, Stream]:
    """Return streams that differ between rows and are at no job's seed."""
    return {name: stream(kind, 2**40 + row) for name, kind in GENERATORS.items()}


def at_their_seed(row: int) -> Mapping[str, Stream]:
    """Return streams of a job of seed 42: row 0 has not drawn, the others drew not from Python."""
    seeded = {name: stream(drawn.kind, 42 + row) for name, drawn in drawn_streams(row).items()}
    return {**drawn_streams(row), "python": seeded["python"]} if row else seeded


def records(
    count: int, streams: Callable[[int], Mapping[str, Stream]] = drawn_streams, **fields: Any
) -> list[Record]:
    """Return ``count`` good records of one job."""
    known = {"world_size": count, "seed": 42, "ranked": True, "resizes": 0, "mesh": None}
    known |= {"rows": count, "taken_at": 10**18}
    return [Record(row=row, streams=streams(row), **{**known, **fields}) for row in range(count)]


def save(rows: Sequence[Record | torch.Tensor], path: Path, key: str = "rng") -> Path:
    """Store records as a job of as many ranks would: a chunk for each."""
    tensors = [row.to_tensor() if isinstance(row, Record) else row for row in rows]
    # One process writes the rows under keys of their own; then they become parts of one tensor.
    dcp.save(
        {str(row): tensor for row, tensor in enumerate(tensors)}, checkpoint_id=path, no_dist=True
    )
    stored_key = f"{key}.{KEY}" if key else KEY
    length = len(tensors[0])

    def join(metadata: Any) -> None:
        offsets = [torch.Size([row * length]) for row in range(len(tensors))]
        properties = TensorProperties(dtype=torch.int64)
        chunks = [ChunkStorageMetadata(offset, torch.Size([length])) for offset in offsets]
        size = torch.Size([length * len(tensors)])
        metadata.state_dict_metadata = {stored_key: TensorStorageMetadata(properties, size, chunks)}
        metadata.planner_data = {stored_key: (*key.split("."), KEY) if key else (KEY,)}
        metadata.storage_data = {
            MetadataIndex(stored_key, offsets[int(at.fqn)]): place
            for at, place in metadata.storage_data.items()
        }

    change_metadata(path, join)
    return path


def record_of(state: State) -> Record:
    """Return the record in what ``state_dict()`` gave."""
    table = state[KEY]
    return Record.from_tensor(table.to_local() if isinstance(table, DTensor) else table)


def altered(state: State, **fields: Any) -> dict[str, torch.Tensor]:
    """Return a state whose record has other values in some fields."""
    return {KEY: replace(record_of(state), **fields).to_tensor()}


def with_stream(state: State, name: str, content: bytes, **fields: Any) -> dict[str, torch.Tensor]:
    """Return a state whose record holds other bytes, or another kind, for a generator."""
    record = record_of(state)
    streams: dict[str, Stream] = {**record.streams}
    known = streams.get(name, Stream("python", False, b""))
    streams[name] = known._replace(state=content, **fields)
    return altered(state, streams=streams)


def with_number(state: State, name: str, index: int, value: int) -> dict[str, torch.Tensor]:
    """Return a state in which one number of 4 bytes of a generator's state is another one."""
    content = bytearray(record_of(state).streams[name].state)
    content[4 * index : 4 * index + 4] = value.to_bytes(4, "little", signed=value < 0)
    return with_stream(state, name, bytes(content))


def without(state: State, *names: str) -> dict[str, torch.Tensor]:
    """Return a state whose record lacks some generators."""
    streams = record_of(state).streams
    return altered(state, streams={n: s for n, s in streams.items() if n not in names})


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
