"""Measure what RNG state in a checkpoint costs, side by side with other ways, in one run.

    python -m scripts.bench [--quick] [--json FILE] [--page docs/cost.md]

Prints medians and whether the targets were met. Takes under 5 minutes on 2 quiet cores; ``--quick``
takes seconds and shows only that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from scripts.bench import (
    alternatives,
    calls,
    checkpoint,
    command,
    elastic,
    planning,
    processes,
    table,
)
from scripts.bench.ranks import Size


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        call_rounds, call_repeat: Rounds of the single calls, and calls in each.
        ranks: Numbers of ranks to launch.
        models: The models that are saved.
        planning_sizes: Numbers of ranks to plan for.
        compared_sizes: Those of them to plan for with a tensor and with rank-named keys too.
        model_sizes: Those of them to plan for together with a model.
        import_rounds: Fresh processes for each module.
        inspected_rows, inspected_rounds: Rows of the checkpoint that the command inspects, how
            often.
        elastic_ranks: Numbers of processes on which the elastic recipe's reduction is measured.
        elastic_rounds: Steps of it.
    """

    call_rounds: int
    call_repeat: int
    ranks: tuple[int, ...]
    models: tuple[Size, ...]
    planning_sizes: tuple[int, ...]
    compared_sizes: tuple[int, ...]
    model_sizes: tuple[int, ...]
    import_rounds: int
    inspected_rows: int
    inspected_rounds: int
    elastic_ranks: tuple[int, ...]
    elastic_rounds: int


FULL = Settings(
    call_rounds=25,
    call_repeat=100,
    ranks=(1, 2, 4),
    models=(
        Size(16, 1, rounds=60, copies=8, ways=("alone", "record", "tensor", "least")),
        # These have no limit to be judged by, and to gather eight times takes long.
        Size(16, 1, rounds=10, copies=8, ways=("alone", *alternatives.NAMES)),
        Size(width=1024, layers=16, rounds=5, ways=("alone", "record")),
    ),
    planning_sizes=(16, 64, 256, 512, 1024, 4096, 16384),
    compared_sizes=(1024, 16384),
    model_sizes=(256, 512),
    import_rounds=5,
    inspected_rows=16384,
    inspected_rounds=5,
    elastic_ranks=(2, 4),
    elastic_rounds=30,
)
QUICK = Settings(
    call_rounds=2,
    call_repeat=2,
    ranks=(2,),
    models=(Size(width=16, layers=1, rounds=2, copies=2),),
    planning_sizes=(4, 8),
    compared_sizes=(4, 8),
    model_sizes=(4,),
    import_rounds=1,
    inspected_rows=4,
    inspected_rounds=1,
    elastic_ranks=(2,),
    elastic_rounds=1,
)


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores, CPU, gloo; Python {platform.python_version()}, "
        f"torch {torch.__version__}, NumPy {np.__version__}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--json", type=Path, help="also write every round to this file")
    parser.add_argument("--page", type=Path, help="put the tables in this page's blocks, by title")
    parser.add_argument("--quick", action="store_true", help="the smallest setting, in seconds")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    started = time.monotonic()
    # What a call costs is not a question of threads, and ranks have one each.
    torch.set_num_threads(1)

    called = calls.measure(settings.call_rounds, settings.call_repeat)
    saved = checkpoint.measure(settings.ranks, settings.models)
    planned = planning.measure(
        settings.planning_sizes, settings.compared_sizes, settings.model_sizes
    )
    imported = processes.measure(settings.import_rounds)
    inspected = command.measure(settings.inspected_rows, settings.inspected_rounds)
    trained = elastic.measure(settings.elastic_ranks, settings.elastic_rounds)
    smallest = checkpoint.smallest(saved, "gathered")
    real = {found.ranks: alternatives.on_real_ranks(found) for found in smallest}
    at_scale = alternatives.by_planning(planned, real[settings.ranks[0]], settings.ranks[0])
    compared = alternatives.comparisons(real, at_scale)
    sections = [
        calls.section(called),
        calls.beside_a_micro_batch(called),
        *elastic.sections(trained),
        *checkpoint.sections(saved),
        *planning.sections(planned),
        processes.section(imported),
        command.section(inspected),
    ]
    headline = f"measured on {date.today()} in {time.monotonic() - started:.0f} s: {machine()}"
    tables: list[table.Section | table.Comparison] = [*sections, *compared]
    blocks = {"measured on": [headline], **{entry.title: entry.lines() for entry in tables}}
    print("\n\n".join("\n".join(lines) for lines in blocks.values()))

    if options.page:
        options.page.write_text(table.filled(options.page.read_text(), blocks))
    if options.json:
        result = {
            "machine": machine(),
            "settings": asdict(settings),
            "calls": called,
            "checkpoints": [asdict(entry) for entry in saved],
            "planning": asdict(planned),
            "imports": imported,
            "inspect": asdict(inspected),
            "elastic": [asdict(entry) for entry in trained],
            "tables": [asdict(entry) for entry in sections],
            "comparisons": [asdict(entry) for entry in compared],
        }
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
