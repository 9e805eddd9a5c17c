"""What a checkpoint costs with RNG state in it, on real ranks under torchrun."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench_timing import Spread, Target, columns, differences
from scripts.demo.launch import torchrun

WORKER = Path(__file__).with_name("bench_worker.py")
IN_MEMORY = Path("/dev/shm")
NEEDED_BYTES = 4 * 2**30

WAYS = {
    "tables": "(b)",
    "file_per_rank": "(c)",
    "gathered": "(d)",
    "rank_named": "(e)",
    "one_tensor": "(f)",
}
LEGEND = [
    "(a) dcp.save and dcp.load of model and optimizer alone, (b) with StatefulRNG,",
    "(c) with a torch.save file per rank and a barrier, (d) with all_gather_object of pickles,",
    "(e) with rank-named keys, (f) without streams, but with one tensor of one number a rank.",
    "(a) in ms, then what each way adds to it, paired by round; of the slowest rank.",
    "async_save: the time that it blocks the training step.",
]
CLOCKS = {"wall": "time", "cpu": "CPU time, a model too small to hide what is added"}


@dataclass(frozen=True)
class Checkpoint:
    """What the worker wrote for one number of ranks and one model.

    Attributes:
        ranks: Number of ranks.
        parameters: Of the model, on all ranks together.
        seconds: By clock (``wall``, ``cpu``), operation and way: the slowest rank's seconds of
            every round.
        on_disk: By way: the ``files`` and ``bytes`` of its checkpoint.
    """

    ranks: int
    parameters: int
    seconds: dict[str, dict[str, dict[str, list[float]]]]
    on_disk: dict[str, dict[str, int]]

    def alone(self, clock: str, operation: str) -> list[float]:
        """Return (a)'s seconds of every round."""
        return self.seconds[clock][operation]["alone"]

    def adds(self, clock: str, operation: str, way: str) -> list[float]:
        """Return for every round the seconds by which a way is above (a)."""
        return differences(self.seconds[clock][operation][way], self.alone(clock, operation))

    def adds_on_disk(self, what: str, way: str) -> int:
        return self.on_disk[way][what] - self.on_disk["alone"][what]


def measure(ranks: Sequence[int], models: Sequence[tuple[int, int, int]]) -> list[Checkpoint]:
    """Measure every number of ranks with every model.

    Args:
        ranks: Numbers of ranks, a launch each.
        models: Width, layers and rounds of each.
    """
    sizes = ["x".join(map(str, model)) for model in models]
    checkpoints = []
    prefix = "nemo_rng_dcp-bench-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=memory_folder()) as out:
        result = Path(out) / "result.json"
        for number in ranks:
            shutil.rmtree(Path(out) / "checkpoints", ignore_errors=True)
            where = ["--out", str(Path(out) / "checkpoints"), "--result", str(result)]
            torchrun(WORKER, number, *where, *sizes, timeout=240)
            checkpoints += [Checkpoint(**raw) for raw in json.loads(result.read_text())]
    return checkpoints


def memory_folder() -> Path | None:
    """Return a folder in memory with room for a checkpoint of every way, if there is one.

    A disk's noise is larger than what is measured.
    """
    if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > NEEDED_BYTES:
        return IN_MEMORY
    return None


def table(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the large model's time and the small one's CPU time; the JSON has all four.

    What RNG state adds does not depend on the model, but how well it can be seen does: a large
    model's own time varies by more than that, and so does time that is shared with other jobs.
    """
    lines = [*LEGEND]
    for clock, parameters in (("wall", largest(checkpoints)), ("cpu", smallest(checkpoints))):
        chosen = [c for c in checkpoints if c.parameters == parameters]
        rounds = len(chosen[0].alone("wall", "save"))
        heads = ("(a)", *(f"{letter} adds" for letter in WAYS.values()), "(b) / (a)")
        rows: list[tuple[str, ...]] = [("", *heads)]
        for checkpoint in chosen:
            rows += [time_row(checkpoint, clock, name) for name in checkpoint.seconds[clock]]
        if clock == "wall":
            for checkpoint in chosen:
                rows += [disk_row(checkpoint, what) for what in ("bytes", "files")]
        title = f"{parameters / 1e6:.2f} M parameters, {rounds} rounds, {CLOCKS[clock]}:"
        lines += ["", title, *columns(rows)]
    return lines


def largest(checkpoints: Sequence[Checkpoint]) -> int:
    return max(checkpoint.parameters for checkpoint in checkpoints)


def smallest(checkpoints: Sequence[Checkpoint]) -> int:
    return min(checkpoint.parameters for checkpoint in checkpoints)


def time_row(checkpoint: Checkpoint, clock: str, operation: str) -> tuple[str, ...]:
    seconds, alone = checkpoint.seconds[clock][operation], checkpoint.alone(clock, operation)
    cells = [
        Spread.of(checkpoint.adds(clock, operation, way)).text(1e-3, sign="+")
        if way in seconds
        else ""
        for way in WAYS
    ]
    ratio = statistics.median(b / a for b, a in zip(seconds["tables"], alone, strict=True))
    label = f"{operation}, {of_ranks(checkpoint)}"
    return label, Spread.of(alone).text(1e-3), *cells, f"{ratio:.2f}"


def disk_row(checkpoint: Checkpoint, what: str) -> tuple[str, ...]:
    cells = [f"{checkpoint.adds_on_disk(what, way):+,}" for way in WAYS]
    label = f"{what}, {of_ranks(checkpoint)}"
    return label, f"{checkpoint.on_disk['alone'][what]:,}", *cells, ""


def of_ranks(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.ranks} rank{'s' if checkpoint.ranks > 1 else ''}"


def bytes_per_rank(checkpoints: Sequence[Checkpoint]) -> float:
    """Return what StatefulRNG adds to a checkpoint, for each rank of the largest job."""
    last = checkpoints[-1]
    return last.adds_on_disk("bytes", "tables") / last.ranks


def targets(checkpoints: Sequence[Checkpoint]) -> list[Target]:
    """Judge what (b) adds by CPU time beside the small model, where it can be seen."""
    large = [c for c in checkpoints if c.parameters == largest(checkpoints)]
    small = [c for c in checkpoints if c.parameters == smallest(checkpoints)]
    found = []
    for beside, checkpoint in zip(large, small, strict=True):
        for operation in ("save", "load"):
            where = f"{operation}, {of_ranks(checkpoint)}"
            ours = checkpoint.adds("cpu", operation, "tables")
            whole = statistics.median(beside.alone("wall", operation))
            shares = [100 * seconds / whole for seconds in ours]
            what = f"{where}: (b) adds in CPU time, % of (a)'s time with the large model"
            found.append(Target.at_most(5.0, what, shares))
            halves = [value / 2 for value in checkpoint.adds("cpu", operation, "file_per_rank")]
            above = [1e3 * seconds for seconds in differences(ours, halves)]
            what = f"{where}: (b) adds, above half of what (c) adds, ms"
            found.append(Target.at_most(0.0, what, above))
    return found
