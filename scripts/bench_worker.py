"""One rank of the checkpoint benchmark; ``bench_checkpoint.py`` launches it under torchrun.

Writes one JSON file: for each model the seconds of every round, the slowest rank's, and what each
way left on disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from scripts.bench_timing import rotated
from scripts.bench_ways import Alone, FilePerRank, Gathered, OneTensor, RankNamed, Tables, Way
from scripts.demo.leaving import leave_group
from scripts.recipes.train_fsdp2 import (
    AppState,
    setup_model_and_optimizer,
    validate_and_prepare_config,
)

_Result = TypeVar("_Result")


class Size(NamedTuple):
    """A model, and how many rounds to measure beside it."""

    width: int
    layers: int
    rounds: int

    @classmethod
    def parse(cls, text: str) -> Size:
        width, layers, rounds = map(int, text.split("x"))
        return cls(width, layers, rounds)


WALL, CPU = "wall", "cpu"

Seconds = dict[str, dict[str, dict[str, list[float]]]]
"""By clock, operation (``save``) and way (``tables``): the seconds of every round."""


def timed(seconds: Seconds, operation: str, way: str, call: Callable[[], _Result]) -> _Result:
    """Append the seconds that a call takes on this rank, and return its result.

    All ranks start together. CPU seconds are those of all threads of the process.
    """
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    for clock, value in ((WALL, wall), (CPU, cpu)):
        seconds.setdefault(clock, {}).setdefault(operation, {}).setdefault(way, []).append(value)
    return result


def fresh(folder: Path) -> Path:
    """Remove what an earlier round left there, so that every round writes new files."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    return folder


def check(name: str, way: Way, app: AppState, folder: Path) -> None:
    """Make sure that a way which is timed brings this rank's streams back."""
    way.save(app, fresh(folder))
    expected = torch.rand(3)
    way.load(app, folder)
    if not isinstance(way, Alone) and not torch.equal(torch.rand(3), expected):
        raise RuntimeError(f"{name} did not bring back the streams of rank {dist.get_rank()}")


def measure_rounds(
    seconds: Seconds, ways: dict[str, Way], app: AppState, out: Path, rounds: int
) -> None:
    """Time every way once a round, after one that only warms up: A B C D E F, then B C D E F A, ...

    Before each turn of saves and of loads one more is made that does not count: the first after
    something else takes some 1.5 ms longer than the next, more than what is measured.
    """
    for name, way in ways.items():
        check(name, way, app, out / name)
    for round_number in range(rounds):
        gc.collect(1)  # what the last round left; what is older stays
        order = rotated(list(ways), round_number)
        last = order[-1]
        ways[last].save(app, fresh(out / last))
        for name in order:
            call = partial(ways[name].save, app, fresh(out / name))
            timed(seconds, "save", name, call)
        ways[last].load(app, out / last)
        for name in order:
            timed(seconds, "load", name, partial(ways[name].load, app, out / name))


def measure_async_rounds(
    seconds: Seconds, tables: Tables, app: AppState, out: Path, rounds: int
) -> None:
    """Time how long ``async_save`` keeps the training step waiting, without and with streams."""
    states: dict[str, dict[str, Any]] = {"alone": {"app": app}}
    states["tables"] = {"app": app, "rng": tables.rng}
    for round_number in range(-1, rounds):
        gc.collect(1)
        order = rotated(list(states), round_number)
        for turn, name in enumerate([order[-1], *order]):
            folder = fresh(out / "async")
            call = partial(dcp.async_save, states[name], checkpoint_id=folder)
            counts = round_number >= 0 and turn > 0  # as above
            written = timed(seconds if counts else {}, "async_save", name, call)
            assert isinstance(written, Future)
            written.result()


def slowest(seconds: Seconds) -> Seconds:
    """Return for every round the seconds of the rank that took longest."""
    ranks: list[Seconds] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, seconds)
    merged = ranks[0]
    for rank in ranks[1:]:
        for clock, operations in merged.items():
            for operation, ways in operations.items():
                for way, values in ways.items():
                    ways[way] = list(map(max, values, rank[clock][operation][way]))
    return merged


def on_disk(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def measure(size: Size, out: Path) -> dict[str, Any]:
    """Measure beside a model of one size."""
    sizes = ["--width", str(size.width), "--layers", str(size.layers)]
    config = validate_and_prepare_config(["--out", str(out), *sizes])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    training = setup_model_and_optimizer(config, mesh)
    app = AppState(training)
    tables = Tables()
    ways: dict[str, Way] = {
        "alone": Alone(),
        "tables": tables,
        "file_per_rank": FilePerRank(),
        "gathered": Gathered(),
        "rank_named": RankNamed(),
        "one_tensor": OneTensor(),
    }
    # Collections of garbage strike at random; between the rounds they hit no one way.
    gc.disable()
    seconds: Seconds = {}
    measure_rounds(seconds, ways, app, out, size.rounds)
    measure_async_rounds(seconds, tables, app, out, size.rounds)
    gc.enable()
    return {
        "ranks": dist.get_world_size(),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "seconds": slowest(seconds),
        "on_disk": {name: on_disk(out / name) for name in ways},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("sizes", type=Size.parse, nargs="+", metavar="WIDTHxLAYERSxROUNDS")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    results = [measure(size, arguments.out) for size in arguments.sizes]
    if dist.get_rank() == 0:
        arguments.result.write_text(json.dumps(results))
    leave_group()


if __name__ == "__main__":
    main()
