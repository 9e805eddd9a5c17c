"""What a user would pick instead of StatefulRNG: on real ranks, and on thousands by planning."""

from __future__ import annotations

import pickle
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scripts.bench.checkpoint import Checkpoint, memory_folder, of_ranks
from scripts.bench.planning import Planning, Scale
from scripts.bench.table import Comparison, text
from scripts.bench.timing import cpu_seconds
from scripts.bench.ways import plain_capture, record

NAMES = {
    "record": "StatefulRNG",
    "tensor": "an existing tensor",
    "file_per_rank": "a file per rank",
    "gathered": "gathered into one file",
    "rank_named": "rank-named keys",
}
COLUMNS = ("save", "load", "files", "bytes", ".metadata", "states a rank holds")


@dataclass(frozen=True)
class Cost:
    """What a way adds to a checkpoint.

    Attributes:
        save, load: CPU seconds of a rank.
        files: How many.
        bytes: On disk, in all files.
        metadata: Those of them in ``.metadata``, which every rank reads at a load.
        held: Bytes of states that a rank has in memory at once.
    """

    save: float
    load: float
    files: int
    bytes: int
    metadata: int
    held: int

    def cells(self) -> tuple[str, ...]:
        sizes = (size(number) for number in (self.bytes, self.metadata, self.held))
        return text(self.save), text(self.load), f"{self.files:,}", *sizes


def size(number: int) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit, bytes_each in (("MB", 10**6), ("kB", 10**3)):
        if number >= bytes_each:
            return f"{number / bytes_each:.1f} {unit}"
    return f"{number} B"


def held(way: str, ranks: int) -> int:
    """Return the bytes of states that a rank has in memory at once."""
    if way in ("record", "tensor"):
        return record().nbytes
    return len(pickle.dumps(plain_capture())) * (ranks if way == "gathered" else 1)


def on_real_ranks(checkpoint: Checkpoint) -> dict[str, Cost]:
    """Return by way what was measured; CPU time is the slowest rank's, the median of all rounds."""
    return {
        way: Cost(
            save=statistics.median(checkpoint.adds("save", way)),
            load=statistics.median(checkpoint.adds("load", way)),
            files=checkpoint.adds_on_disk("files", way),
            bytes=checkpoint.adds_on_disk("bytes", way),
            metadata=checkpoint.adds_on_disk("metadata", way),
            held=held(way, checkpoint.ranks),
        )
        for way in NAMES
    }


def by_planning(
    scale: Scale, measured: Mapping[str, Cost], ranks: int
) -> dict[int, dict[str, Cost]]:
    """Return by number of ranks and way what it would add there.

    Of what goes through DCP the CPU time of planning alone: rank 0's for a save, one rank's for a
    load. Of a file per rank that of a rank, which is the same on any number. Of gathering that of
    rank 0, which unpacks and writes as many states, and of a rank that reads them.

    Args:
        scale: The plans.
        measured: What :func:`on_real_ranks` found.
        ranks: On how many ranks.
    """
    records = {plan.ranks: plan for plan in scale.records}
    found = {}
    for tensor, named in zip(scale.tensor, scale.rank_named, strict=True):
        number = named.ranks
        plans = {"record": records[number], "tensor": tensor, "rank_named": named}
        found[number] = {
            way: _at(number, way, plans.get(way), measured[way], ranks) for way in NAMES
        }
    return found


def _at(number: int, way: str, plan: Planning | None, measured: Cost, ranks: int) -> Cost:
    data = (measured.bytes - measured.metadata) * number // ranks
    if plan is not None:
        seconds, files, metadata = (
            (plan.save_seconds, plan.load_plan["default"]),
            0,
            plan.metadata_bytes,
        )
    elif way == "gathered":
        seconds, files, metadata = gathering(number), 1, 0
    else:
        seconds, files, metadata = (measured.save, measured.load), number, 0
    return Cost(*seconds, files, data + metadata, metadata, held(way, number))


def gathering(ranks: int) -> tuple[float, float]:
    """Return the CPU seconds of rank 0's save and of a rank's load, without what is sent."""
    sent = pickle.dumps(plain_capture())
    with tempfile.NamedTemporaryFile(dir=memory_folder()) as file:

        def save() -> None:
            torch.save([pickle.loads(sent) for _ in range(ranks)], file.name)

        return (
            cpu_seconds(save)[0],
            cpu_seconds(lambda: torch.load(file.name, weights_only=False))[0],
        )


def comparisons(
    real: Mapping[int, Mapping[str, Cost]], planned: Mapping[int, Mapping[str, Cost]]
) -> list[Comparison]:
    """Return a table for each number of ranks."""
    titles = {n: f"added on {of_ranks(n)}, CPU time" for n in real}
    titles |= {n: f"added on {n:,} ranks, by planning alone" for n in planned}
    return [
        Comparison(
            titles[ranks], COLUMNS, [(name, *costs[way].cells()) for way, name in NAMES.items()]
        )
        for found in (real, planned)
        for ranks, costs in found.items()
    ]
