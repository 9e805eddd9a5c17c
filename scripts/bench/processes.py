"""What a fresh process costs: importing the library."""

from __future__ import annotations

import subprocess
import sys

from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target

OURS, TORCH = "nemo_rng_dcp", "torch.distributed.checkpoint"

Seconds = dict[str, list[float]]
"""By module: the CPU seconds of every round."""


def measure(rounds: int) -> Seconds:
    """Import each module in so many fresh processes, in turns, after a round that only warms up."""
    seconds: Seconds = {OURS: [], TORCH: []}
    for _ in range(-1, rounds):
        for module, values in seconds.items():
            values.append(import_seconds(module))
    return {module: values[1:] for module, values in seconds.items()}


def import_seconds(module: str) -> float:
    program = f"import {module}, time; print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=100, check=True
    )
    return float(done.stdout)


def section(seconds: Seconds) -> Section:
    ours, theirs = seconds[OURS], seconds[TORCH]
    # What a process does once: at most 5% above what it imports anyway.
    row = Row("import, CPU time", text(ours), text(theirs), Target.ratio(1.05, ours, theirs))
    return Section("a fresh process", TORCH, [row])
