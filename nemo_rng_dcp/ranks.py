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


def gather_fingerprints(row: int, fingerprints: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the fingerprints of the streams of all rows, by row; every rank must call it.

    Args:
        row: This rank's row. Of ranks that share one, the lowest speaks.
        fingerprints: This rank's by generator; the same names on every rank.
    """
    rows: dict[int, dict[str, str]] = {}
    for number, *values in _gather(row, fingerprints):
        gathered = [f"{value:012x}" for value in values]
        rows.setdefault(number, dict(zip(fingerprints, gathered, strict=True)))
    return [rows[number] for number in sorted(rows)]


def drifted(row: int, fingerprints: Mapping[str, str], shared: Collection[str]) -> list[str]:
    """Return where ranks should have one stream and have not; every rank must call it.

    Args:
        row: This rank's row.
        fingerprints: This rank's by generator; the same names on every rank.
        shared: The generators that are alike on all ranks; the others are alike within a row.

    Returns:
        The same on every rank: one text for each generator and row in which ranks differ.
    """
    everyone = _gather(row, fingerprints)
    sharing: dict[int, list[int]] = {}
    for rank, (number, *_) in enumerate(everyone):
        sharing.setdefault(number, []).append(rank)
    messages = []
    for column, name in enumerate(fingerprints, start=1):
        groups = {"all ranks share it": list(range(len(everyone)))}
        if name not in shared:
            groups = {
                f"ranks {', '.join(map(str, ranks))} share row {number}": ranks
                for number, ranks in sharing.items()
            }
        for text, ranks in groups.items():
            other = [r for r in ranks if everyone[r][column] != everyone[ranks[0]][column]]
            if other:
                differ = f"rank {', '.join(map(str, other))} differs from rank {ranks[0]}"
                messages.append(f"{name}: {text}, but {differ}")
    return messages


def _gather(row: int, fingerprints: Mapping[str, str]) -> list[list[int]]:
    """Return by rank its row and the fingerprints of its streams, as numbers."""
    numbers = [row, *(int(fingerprint, 16) for fingerprint in fingerprints.values())]
    if not dist.is_initialized():
        return [numbers]
    # "cpu:gloo,cuda:nccl" or "cuda:nccl": a group that serves the CPU is used there.
    devices = [backend.split(":")[0] for backend in dist.get_backend_config().split(",")]
    own = torch.tensor(numbers, dtype=torch.int64, device="cpu" if "cpu" in devices else devices[0])
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    return [gathered.tolist() for gathered in everyone]
