"""What RNG state adds to a checkpoint, measured on real ranks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.ranks import Seconds, Size, launch
from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target, differences

IN_MEMORY = Path("/dev/shm")
NEEDED_BYTES = 2 * 2**30

LIMITS = {"save": 2.2, "load": 3.0}
"""How many times as much as one more tensor that exists the record may add."""


@dataclass(frozen=True)
class Checkpoint:
    """What one number of ranks measured beside one model.

    Attributes:
        ranks: Number of ranks.
        parameters: Of the model, on all ranks together.
        copies: How many of what a way adds were in one checkpoint.
        seconds: The CPU seconds of the slowest rank, by operation and way, of every round.
        on_disk: By way: the ``files`` and ``bytes`` of its checkpoint.
    """

    ranks: int
    parameters: int
    copies: int
    seconds: Seconds
    on_disk: dict[str, dict[str, int]]

    def adds(self, operation: str, way: str) -> list[float]:
        """Return for every round the seconds by which one copy of a way is above no streams."""
        added = differences(self.seconds[operation][way], self.seconds[operation]["alone"])
        return [seconds / self.copies for seconds in added]

    def adds_on_disk(self, what: str, way: str) -> int:
        return (self.on_disk[way][what] - self.on_disk["alone"][what]) // self.copies


def measure(ranks: Sequence[int], sizes: Sequence[Size]) -> list[Checkpoint]:
    """Measure every number of ranks with every model."""
    checkpoints = []
    for number in ranks:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=memory_folder()) as folder:
            checkpoints += [Checkpoint(**raw) for raw in launch(number, [*sizes], Path(folder))]
    return checkpoints


def memory_folder() -> Path | None:
    """Return a folder in memory with room for a checkpoint of every way, if there is one.

    A disk's noise is larger than what is measured.
    """
    if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > NEEDED_BYTES:
        return IN_MEMORY
    return None


def smallest(checkpoints: Sequence[Checkpoint], way: str) -> list[Checkpoint]:
    """Return those beside the smallest model with which a way was measured.

    What RNG state adds does not depend on the model, but how well it can be seen does.
    """
    parameters = min(checkpoint.parameters for checkpoint in checkpoints)
    return [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint.parameters == parameters and way in checkpoint.seconds["save"]
    ]


def sections(checkpoints: Sequence[Checkpoint]) -> list[Section]:
    """Return what is added beside the smallest model, and what the largest takes by itself."""
    parameters = max(checkpoint.parameters for checkpoint in checkpoints)
    large = [checkpoint for checkpoint in checkpoints if checkpoint.parameters == parameters]
    return [
        *(added(cost) for cost in smallest(checkpoints, "least")),
        Section(
            f"beside a model of {parameters / 1e6:.1f} M parameters, CPU time",
            "without",
            [
                Row(
                    f"dcp.{operation}, {of_ranks(checkpoint.ranks)}",
                    text(checkpoint.seconds[operation]["record"]),
                    text(checkpoint.seconds[operation]["alone"]),
                )
                for checkpoint in large
                for operation in LIMITS
            ],
        ),
    ]


def added(checkpoint: Checkpoint) -> Section:
    rows = []
    for operation, limit in LIMITS.items():
        ours, tensor, least = (
            checkpoint.adds(operation, way) for way in ("record", "tensor", "least")
        )
        target = Target.ratio(limit, ours, tensor)
        rows.append(Row(f"dcp.{operation}", text(ours), text(tensor), target))
        rows.append(Row("  with streams captured and restored by hand", "", text(least)))
    blocked = text(checkpoint.adds("async_save", "record"))
    rows.append(Row("dcp.async_save, until it returns", blocked))
    title = f"added to a checkpoint of {of_ranks(checkpoint.ranks)}, CPU time"
    return Section(title, "an existing tensor", rows)


def of_ranks(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"
