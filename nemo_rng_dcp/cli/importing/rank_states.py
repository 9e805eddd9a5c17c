"""The states that every rank of a job left in a framework's checkpoint, and a record of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators.mt19937 import MT19937State
from nemo_rng_dcp.generators.torch_random import to_bytes
from nemo_rng_dcp.record import Record, Stream
from nemo_rng_dcp.versions import UNSEEDED

_WORDS = {
    "": {"xpu", "mps", "npu", "mlu", "musa", "hpu", "xm"},
    "numpy": {"numpy", "np"},
    "cuda": {"cuda"},
    "torch": {"torch", "cpu"},
    "python": {"python", "random"},
}
"""What a name says of a generator; the first of these is meant, as in ``random_state_0.numpy``."""
_LARGEST = 2**16
"""More numbers than any generator's state has."""


@dataclass(frozen=True)
class RankStates:
    """The states of one rank.

    Attributes:
        place: The file or the key that they were in.
        taken_at: When they were written, in ns since 1970, UTC.
        states: Some of "python", "numpy", "torch" and "cuda", each as ``random.getstate()`` or its
            library's function gives it, "cuda" also as a list of the states of several devices.
    """

    place: str
    taken_at: int
    states: dict[str, Any]


@dataclass(frozen=True)
class JobStates:
    """The states of all ranks of a job.

    Attributes:
        framework: Whose checkpoint it is.
        where: The folder or file.
        ranks: By rank.
        unread: What looks like state of other generators.
    """

    framework: str
    where: str
    ranks: Mapping[int, RankStates]
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.where


def require_all(where: str, found: set[int], expected: set[int]) -> None:
    """Make sure that no rank is missing.

    Args:
        where: What an error begins with.
        found: The ranks that have states.
        expected: Ranks that are known to be of the job. So are all below the highest of both.

    Raises:
        RNGStateError: The states of some rank are missing.
    """
    ranks = max(found | expected) + 1
    if len(found) < ranks:
        # Not all of them: a number in a name may be anything.
        missing = islice((str(rank) for rank in range(ranks) if rank not in found), 10)
        text = f"the states of rank {', '.join(missing)} are missing"
        raise RNGStateError(f"{where}: {text}; there are those of {len(found)} of {ranks} ranks")


def generator_of(name: str) -> str:
    """Return "python", "numpy", "torch" or "cuda", by a field's or a key's name; "" for none."""
    found = set(re.findall(r"[a-z]+", name.lower()))
    return next((generator for generator, words in _WORDS.items() if words & found), "")


def to_records(job: JobStates) -> list[Record]:
    """Return a record for each rank; rank r becomes row r.

    Of several devices' states a rank's own is the one of the only device that was drawn from. The
    seed is rank 0's, if torch's state tells it; the streams count as ranked if ranks differ.

    Raises:
        RNGStateError: A state is malformed, ranks have other states than rank 0, or several devices
            were drawn from.
    """
    streams = [_streams(job, rank) for rank in sorted(job.ranks)]
    sizes = [{name: len(stream.state) for name, stream in row.items()} for row in streams]
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            raise RNGStateError(
                f"{job.where}: rank {rank} has states of {size} bytes and rank 0 of {sizes[0]}: "
                "they are no ranks of one job"
            )
    first = streams[0]
    # As torch's state begins; its generator uses 32 bits of it.
    seed = int.from_bytes(first["torch"].state[:4], "little") if "torch" in first else None
    return [
        Record(
            row=rank,
            rows=len(streams),
            world_size=len(streams),
            taken_at=job.ranks[rank].taken_at,
            seed=seed,
            ranked=any(row != first for row in streams),
            resizes=0,
            mesh=None,
            hash_seed=UNSEEDED,  # that of the job is not known, and not this command's
            streams=streams[rank],
        )
        for rank in range(len(streams))
    ]


def _streams(job: JobStates, rank: int) -> dict[str, Stream]:
    saved, streams = job.ranks[rank], {}
    for name, (kind, pack) in _GENERATORS.items():
        state, where = saved.states.get(name), f"{job.where}: {saved.place}: {name}"
        try:
            _require_small(state)
            if name == "cuda" and isinstance(state, list):
                # One process saves one device's, or a list of all that it sees.
                state = _own_device(state, where) if state else None
            if state is not None:
                streams[name] = Stream(kind, False, pack(state))
        except (ValueError, TypeError) as error:
            raise RNGStateError(f"{where}: the state is malformed: {error}") from error
    return streams


def _own_device(states: list[Any], where: str) -> Any:
    """Return the state of the device that a rank has drawn from, of all that its process saw."""
    # A state ends with how much was drawn. Devices of other ranks stand where they were seeded.
    by_bytes = {to_bytes(state): state for state in states}
    used = [packed for packed in by_bytes if any(packed[-8:])] or [*by_bytes]
    if len(used) > 1:
        raise RNGStateError(
            f"{where}: of the states of {len(states)} devices {len(used)} may be this rank's: keep "
            "in the list the one of the device that it drew from"
        )
    return by_bytes[used[0]]


def _torch_bytes(state: torch.Tensor) -> bytes:
    packed = to_bytes(state)
    MT19937State.from_torch(state)  # which refuses what torch would not take
    return packed


def _require_small(state: Any) -> None:
    """Refuse what stands for more than any state has: by repetition it takes no bytes in a file."""
    left, seen = [state], 0
    while left:
        value, seen = left.pop(), seen + 1
        if isinstance(value, (tuple, list)):
            left += value
        elif isinstance(value, dict):
            left += value.values()
        size = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", 0)
        if seen + len(left) > _LARGEST or (isinstance(size, int) and size > _LARGEST):
            raise ValueError(f"it has more than {_LARGEST} numbers")


_GENERATORS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "python": ("python", lambda state: MT19937State.from_python(state).to_bytes()),
    "numpy": ("numpy", lambda state: MT19937State.from_numpy(state).to_bytes()),
    "torch": ("torch.cpu", _torch_bytes),
    "cuda": ("torch.cuda", to_bytes),
}
