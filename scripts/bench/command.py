"""What ``nemo-rng-dcp inspect`` takes for a checkpoint of thousands of rows."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from nemo_rng_dcp import StatefulRNG, init_all_rng
from nemo_rng_dcp.record import KEY, Record
from scripts.bench import processes
from scripts.bench.checkpoint import memory_folder
from scripts.bench.planning import create_fake_group, plan_of_rank
from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target

TIMES_TORCH = 2.5
"""How many times as long as importing torch the command may take: 5 s where that takes 2 s."""

WAIT = """
import resource, subprocess, sys
command = [sys.argv[1], "-m", "nemo_rng_dcp", "inspect", sys.argv[2]]
code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
if code:
    sys.exit(f"inspect ended with {code}, see above")
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


@dataclass(frozen=True)
class Inspection:
    """What the command takes for so many rows, in every round.

    Attributes:
        rows: Of the checkpoint.
        seconds: CPU seconds.
        torch: Those of a process that only imports torch, in turns with it.
        memory: The most bytes that it had in memory at once.
    """

    rows: int
    seconds: list[float]
    torch: list[float]
    memory: int


class AllRows(DefaultSavePlanner):
    """Lets one process write every rank's record.

    Args:
        records: By row, int64, all of one length.
    """

    def __init__(self, records: list[torch.Tensor]) -> None:
        super().__init__()
        self._records = records

    def create_local_plan(self) -> SavePlan:
        own = super().create_local_plan()
        items = [plan_of_rank(own, rank).items[0] for rank in range(len(self._records))]
        self.plan = replace(own, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.offset is not None
        return self._records[write_item.index.offset[0] // len(self._records[0])]


def measure(rows: int, rounds: int) -> Inspection:
    """Write a checkpoint of so many rows and let fresh processes inspect it."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=memory_folder()) as folder:
        write(Path(folder), rows)
        found, imports = [], []
        for _ in range(rounds):
            found.append(_inspect(folder))
            imports.append(processes.import_seconds("import torch"))
    seconds, memory = zip(*found, strict=True)
    return Inspection(rows, list(seconds), imports, max(memory))


def _inspect(folder: str) -> tuple[float, int]:
    # Through a small process: a fork of this one begins with this one's memory.
    command = [sys.executable, "-c", WAIT, sys.executable, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, memory = done.stdout.split()
    return float(seconds), int(memory) * (1 if sys.platform == "darwin" else 1024)


def write(folder: Path, rows: int) -> None:
    """Save what a job of so many ranks would."""
    create_fake_group(0, rows)
    rng = StatefulRNG(seed=0, ranked=True)
    records = []
    for row in range(rows):
        init_all_rng(row)
        random.random(), np.random.random(), torch.rand(1)
        table = rng.state_dict()[KEY]
        assert isinstance(table, DTensor)
        record = Record.from_tensor(table.to_local())
        records.append(replace(record, row=row).to_tensor())
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    dcp.save({"rng": rng}, checkpoint_id=folder, planner=AllRows(records), no_dist=True)
    dist.destroy_process_group()


def section(inspection: Inspection) -> Section:
    memory, spent = inspection.memory / 1e6, inspection.seconds
    target = Target.ratio(TIMES_TORCH, spent, inspection.torch)
    rows = [
        Row("CPU time", text(spent), text(inspection.torch), target),
        Row("memory", f"{memory:.0f} MB", "", Target.at_most(300, memory, " MB")),
    ]
    return Section(f"nemo-rng-dcp inspect, {inspection.rows:,} rows", "importing torch", rows)
