"""Measure what RNG state in a checkpoint costs, side by side with the other ways, in one run.

Prints tables of ``median [lower quartile, upper quartile]`` and whether the targets were met; with
``--json`` everything goes into a file too. Under 5 minutes on 2 cores; ``--quick`` takes seconds
and shows only that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from scripts import bench_calls, bench_checkpoint, bench_planning
from scripts.bench_timing import Target


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        call_rounds, call_repeat: Rounds of the single calls, and calls in each.
        ranks: Numbers of ranks to launch.
        models: Width, layers and rounds of every model that is saved.
        planning_sizes: Numbers of ranks to plan for.
        rank_named_limit: The largest of them for rank-named keys, whose time grows quadratically.
        model_sizes: Those of them to plan for together with a model.
    """

    call_rounds: int
    call_repeat: int
    ranks: tuple[int, ...]
    models: tuple[tuple[int, int, int], ...]
    planning_sizes: tuple[int, ...]
    rank_named_limit: int
    model_sizes: tuple[int, ...]


FULL = Settings(
    call_rounds=25,
    call_repeat=100,
    ranks=(1, 2, 4),
    models=((512, 6, 5), (16, 1, 16)),
    planning_sizes=(256, 512, 1024, 4096, 8192, 16384),
    rank_named_limit=8192,
    model_sizes=(256, 512, 1024),
)
QUICK = Settings(
    call_rounds=2,
    call_repeat=2,
    ranks=(2,),
    models=((16, 1, 2),),
    planning_sizes=(4, 8),
    rank_named_limit=8,
    model_sizes=(4,),
)


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores, CPU, gloo; Python {platform.python_version()}, "
        f"torch {torch.__version__}, NumPy {np.__version__}"
    )


def show(title: str, lines: Sequence[str]) -> None:
    print(f"\n{title}\n")
    print("\n".join(lines), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--quick", action="store_true", help="the smallest setting, in seconds")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    started = time.monotonic()
    # What a call costs is not a question of threads, and ranks have one each.
    torch.set_num_threads(1)

    print(machine())
    calls = bench_calls.measure(settings.call_rounds, settings.call_repeat)
    show("1. Per call", bench_calls.table(calls))
    checkpoints = bench_checkpoint.measure(settings.ranks, settings.models)
    where = "in memory" if bench_checkpoint.memory_folder() else "on disk"
    show(f"2. Per checkpoint, files {where}", bench_checkpoint.table(checkpoints))
    scale = bench_planning.measure(
        settings.planning_sizes, settings.rank_named_limit, settings.model_sizes
    )
    show("3. Planning, CPU time in one process", bench_planning.table(scale))
    per_rank = bench_checkpoint.bytes_per_rank(checkpoints)
    show("4. Memory", bench_calls.memory_table(calls, per_rank))
    targets: list[Target] = [
        *bench_calls.targets(calls),
        *bench_checkpoint.targets(checkpoints),
        *bench_planning.targets(scale),
    ]
    show("Targets", [target.text() for target in targets])
    seconds = time.monotonic() - started
    print(f"\n{seconds:.0f} s")

    if options.json:
        result = {
            "machine": machine(),
            "settings": asdict(settings),
            "files": where,
            "calls": asdict(calls),
            "checkpoints": [asdict(checkpoint) for checkpoint in checkpoints],
            "planning": bench_planning.as_json(scale),
            "checkpoint_bytes_per_rank": per_rank,
            "targets": [asdict(target) for target in targets],
            "seconds": seconds,
        }
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
