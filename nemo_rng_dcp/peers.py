"""What the ranks of a job say of one another's streams. Collectives of one all-gather each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemo_rng_dcp.layout import gather
from nemo_rng_dcp.rows import digest, fingerprint, int64


def fingerprints(row: int, states: Mapping[str, torch.Tensor]) -> list[dict[str, str]]:
    """Return the fingerprints of the streams of all rows, by row; every rank must call it.

    Args:
        row: This rank's row. Of ranks that share one, the lowest speaks.
        states: This rank's states by generator; the same names on every rank.
    """
    digits = {name: fingerprint(state) for name, state in states.items()}
    own = int64(row, *(int(text, 16) for text in digits.values()))
    rows: dict[int, dict[str, str]] = {}
    for its_row, *its_numbers in gather(own).tolist():
        its_digits = [f"{number:012x}" for number in its_numbers]
        rows.setdefault(its_row, dict(zip(digits, its_digits, strict=True)))
    return [rows[number] for number in sorted(rows)]


def drifted(row: int, states: Mapping[str, torch.Tensor]) -> list[str]:
    """Return where ranks share a row but not its streams, readably; every rank must call it.

    Args:
        row: This rank's row.
        states: This rank's states by generator; the same names on every rank.

    Returns:
        The same on every rank: one text for each generator and row in which ranks differ.
    """
    own = int64(row, *(digest(name, row, state) for name, state in states.items()))
    everyone = gather(own).tolist()
    sharing: dict[int, list[int]] = {}
    for rank, (its_row, *_) in enumerate(everyone):
        sharing.setdefault(its_row, []).append(rank)
    return [
        f"{name}: ranks {', '.join(map(str, ranks))} share row {shared}, but their streams differ"
        for column, name in enumerate(states, start=1)
        for shared, ranks in sharing.items()
        if len({everyone[rank][column] for rank in ranks}) > 1
    ]
