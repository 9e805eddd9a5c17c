"""What the ranks of a job say of one another's streams. Collectives of one all-gather each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist

from nemo_rng_dcp.layout import world_size
from nemo_rng_dcp.record import fingerprint


def fingerprints(row: int, states: Mapping[str, bytes]) -> list[dict[str, str]]:
    """Return the fingerprints of the streams of all rows, by row; every rank must call it.

    Args:
        row: This rank's row. Of ranks that share one, the lowest speaks.
        states: This rank's packed states by generator; the same names on every rank.
    """
    rows: dict[int, dict[str, str]] = {}
    for its_row, *numbers in _gather(row, states):
        digits = [f"{number:012x}" for number in numbers]
        rows.setdefault(its_row, dict(zip(states, digits, strict=True)))
    return [rows[number] for number in sorted(rows)]


def drifted(row: int, states: Mapping[str, bytes], shared: Collection[str]) -> list[str]:
    """Return where ranks should have one stream and have not; every rank must call it.

    Args:
        row: This rank's row.
        states: This rank's packed states by generator; the same names on every rank.
        shared: The generators that are alike on all ranks; the others are alike within a row.

    Returns:
        The same on every rank: one text for each generator and row in which ranks differ.
    """
    everyone = _gather(row, states)
    sharing: dict[int, list[int]] = {}
    for rank, (its_row, *_) in enumerate(everyone):
        sharing.setdefault(its_row, []).append(rank)
    texts = []
    for column, name in enumerate(states, start=1):
        groups = {"all ranks share it": list(range(len(everyone)))}
        if name not in shared:
            groups = {
                f"ranks {', '.join(map(str, ranks))} share row {its_row}": ranks
                for its_row, ranks in sharing.items()
            }
        for text, ranks in groups.items():
            other = [r for r in ranks if everyone[r][column] != everyone[ranks[0]][column]]
            if other:
                differ = f"rank {', '.join(map(str, other))} differs from rank {ranks[0]}"
                texts.append(f"{name}: {text}, but {differ}")
    return texts


def _gather(row: int, states: Mapping[str, bytes]) -> list[list[int]]:
    """Return by rank its row and the fingerprints of its states, as numbers."""
    numbers = [row, *(int(fingerprint(state), 16) for state in states.values())]
    if not dist.is_initialized():
        return [numbers]
    # "cpu:gloo,cuda:nccl" or "cuda:nccl": a group that serves the CPU is used there.
    devices = [served.split(":")[0] for served in dist.get_backend_config().split(",")]
    own = torch.tensor(numbers, dtype=torch.int64, device="cpu" if "cpu" in devices else devices[0])
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    return [its.tolist() for its in everyone]
