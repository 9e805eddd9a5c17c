"""Which rank this process is, and what the ranks of a job say of one another's streams.

| | rank | world size | a collective |
|---|---|---|---|
| no process group | torchrun's ``RANK``, else 0 | 1 | asks nobody |
| a process group | the group's | the group's | one all-gather |
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist


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


def launched_processes() -> int:
    """Return how many processes torchrun started (``WORLD_SIZE``), 1 if it did not."""
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if value.isdecimal() else 1


def gather_fingerprints(own: Mapping[int, Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the fingerprints of the streams of all rows, by row; every rank must call it.

    Args:
        own: This rank's by row and generator; as many rows and the same names on every rank. Of
            ranks that share a row, the lowest speaks.
    """
    rows: dict[int, dict[str, str]] = {}
    names = list(next(iter(own.values())))
    for _, row, values in _gather(own):
        gathered = [f"{value:012x}" for value in values]
        rows.setdefault(row, dict(zip(names, gathered, strict=True)))
    return [rows[number] for number in sorted(rows)]


def drifted(own: Mapping[int, Mapping[str, str]], shared: Collection[str]) -> list[str]:
    """Return where ranks should have one stream and have not; every rank must call it.

    Args:
        own: As for :func:`gather_fingerprints`.
        shared: The generators that are alike on all ranks; the others are alike within a row.

    Returns:
        The same on every rank: one text for each generator and row in which ranks differ.
    """
    everyone = _gather(own)
    sharing: dict[int, list[_Said]] = {}
    for rank, row, values in everyone:
        sharing.setdefault(row, []).append((rank, row, values))
    messages = []
    for column, name in enumerate(next(iter(own.values()))):
        groups = {"all ranks share it": everyone}
        if name not in shared:
            groups = {
                f"ranks {', '.join(str(rank) for rank, *_ in peers)} share row {row}": peers
                for row, peers in sharing.items()
            }
        for text, (first, *others) in groups.items():
            other = [entry for entry in others if entry[2][column] != first[2][column]]
            if other:
                # A process that plays several ranks is named by those.
                place = 0 if len(own) == 1 or name not in shared else 1
                ranks = ", ".join(dict.fromkeys(str(entry[place]) for entry in other))
                differ = f"rank {ranks} differs from rank {first[place]}"
                messages.append(f"{name}: {text}, but {differ}")
    return messages


_Said = tuple[int, int, list[int]]
"""A rank, one of its rows, and the fingerprints of that row's streams as numbers."""


def _gather(own: Mapping[int, Mapping[str, str]]) -> list[_Said]:
    """Return what all ranks say, in the order of the ranks."""
    numbers = [
        [row, *(int(fingerprint, 16) for fingerprint in fingerprints.values())]
        for row, fingerprints in own.items()
    ]
    everyone = [numbers]
    if dist.is_initialized():
        # "cpu:gloo,cuda:nccl" or "cuda:nccl": a group that serves the CPU is used there.
        devices = [backend.split(":")[0] for backend in dist.get_backend_config().split(",")]
        device = "cpu" if "cpu" in devices else devices[0]
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        gathered = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(gathered, mine)
        everyone = [tensor.tolist() for tensor in gathered]
    return [(rank, row, values) for rank, rows in enumerate(everyone) for row, *values in rows]
