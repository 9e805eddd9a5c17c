"""Records that are not as they were saved, with a check word that fits them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nemo_rng_dcp.record import KEY, Record, Stream

State = Mapping[str, torch.Tensor]


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
