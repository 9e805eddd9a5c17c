"""What one call costs in one process, and what the streams take up in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rng_dcp import ScopedRNG, StatefulRNG, derive_seed
from scripts.bench_timing import Spread, Target, columns, interleaved
from scripts.bench_ways import plain_capture, plain_restore

ROWS = {
    "capture": ("state_dict", "plain_capture"),
    "check and restore": ("load_state_dict", "plain_restore"),
    "fingerprint": ("fingerprint", "plain_capture"),
}
"""Row of the table: the call of ours and the plain one beside it."""

SEEDING_ROWS = {
    "with ScopedRNG(derive_seed(...))": "scope",
    "Generator().manual_seed(derive_seed(...))": "derived_generator",
}
"""Row of the table: ways to seed by what a number is for, which have no plain one beside them."""


@dataclass(frozen=True)
class Calls:
    """Seconds a call in every round, by the call's name; bytes, by what they are for."""

    seconds: dict[str, list[float]]
    memory: dict[str, int]

    def ratios(self, row: str) -> list[float]:
        """Return for every round how many times as long ours took as the plain way."""
        ours, theirs = (self.seconds[name] for name in ROWS[row])
        return [value / other for value, other in zip(ours, theirs, strict=True)]


def measure(rounds: int, repeat: int) -> Calls:
    """Measure without a process group."""
    rng = StatefulRNG(seed=0)
    state, plain = rng.state_dict(), plain_capture()
    calls: dict[str, Callable[[], object]] = {
        "numpy_capture": np.random.get_state,
        "plain_capture": plain_capture,
        "state_dict": rng.state_dict,
        "plain_restore": lambda: plain_restore(plain),
        "load_state_dict": lambda: rng.load_state_dict(state),
        "fingerprint": rng.fingerprint,
        "scope": enter_scope,
        "derived_generator": lambda: torch.Generator().manual_seed(sample_seed()),
    }
    memory = {
        "state_dict": size_in_memory(list(state.values())),
        "plain_capture": size_in_memory(plain),
        # What the object keeps, however large the job is.
        "kept_for_rewind": sum(
            size_in_memory(table) for name, table in state.items() if name != "origin"
        ),
    }
    return Calls(interleaved(calls, rounds, repeat), memory)


def sample_seed() -> int:
    return derive_seed(42, "augment", 3, 1234)


def enter_scope() -> None:
    with ScopedRNG(sample_seed()):
        pass


def size_in_memory(value: object) -> int:
    """Return the bytes of a value and of all that it holds."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(size_in_memory(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return size + sum(size_in_memory(item) for item in value)
    return size


def table(calls: Calls) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("no process group", "StatefulRNG, us", "plain way, us", "times the plain way")
    ]
    for row, names in ROWS.items():
        cells = [Spread.of(calls.seconds[name]).text(1e-6) for name in names]
        rows.append((row, *cells, Spread.of(calls.ratios(row)).text(1, digits=2)))
    for row, name in SEEDING_ROWS.items():
        rows.append((row, Spread.of(calls.seconds[name]).text(1e-6), "", ""))
    numpy_alone = Spread.of(calls.seconds["numpy_capture"]).text(1e-6)
    rows.append(("np.random.get_state(), part of both", "", numpy_alone, ""))
    return columns(rows)


def memory_table(calls: Calls, checkpoint_bytes: float) -> list[str]:
    """Return the memory table.

    Args:
        calls: What :func:`measure` gave.
        checkpoint_bytes: What StatefulRNG adds to a checkpoint for a rank.
    """
    memory = calls.memory
    return columns(
        [
            ("bytes a rank", "StatefulRNG", "plain way"),
            ("captured, in memory", f"{memory['state_dict']:,}", f"{memory['plain_capture']:,}"),
            ("kept after a load, for rewind()", f"{memory['kept_for_rewind']:,}", "0"),
            ("in the checkpoint", f"{checkpoint_bytes:,.0f}", ""),
        ]
    )


def targets(calls: Calls) -> list[Target]:
    return [
        Target.at_most(1.0, f"{row}, times the plain way", calls.ratios(row))
        for row in ("capture", "check and restore")
    ]
