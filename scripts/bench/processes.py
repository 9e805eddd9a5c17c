"""What a fresh process costs: importing the library."""

from __future__ import annotations

import subprocess
import sys

from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target

OURS = "from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG"
TORCH = "import torch.distributed.checkpoint"

Seconds = dict[str, list[float]]
"""By statement: the CPU seconds of every round."""


def measure(rounds: int) -> Seconds:
    """Import both in so many fresh processes each, in turns; of several, one more warms up."""
    seconds: Seconds = {OURS: [], TORCH: []}
    for _ in range(rounds + (rounds > 1)):
        for statement, values in seconds.items():
            values.append(import_seconds(statement))
    return {statement: values[-rounds:] for statement, values in seconds.items()}


def import_seconds(statement: str) -> float:
    program = f"{statement}; import time; print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=100, check=True
    )
    return float(done.stdout)


def section(seconds: Seconds) -> Section:
    ours, theirs = seconds[OURS], seconds[TORCH]
    # What a process does once: at most 5% above what it imports anyway.
    row = Row("import, CPU time", text(ours), text(theirs), Target.ratio(1.05, ours, theirs))
    return Section("a fresh process", "torch's DCP", [row])
