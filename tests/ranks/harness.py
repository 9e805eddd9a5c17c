"""Runs the checks of a script on every rank of a real process group."""

import sys
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scripts.demo.leaving import leave_group


def checks_of(module: types.ModuleType) -> list[str]:
    return [name for name in vars(module) if name.startswith("check_")]


def run(namespace: dict[str, Callable[[Path], None]]) -> None:
    """Run every ``check_*`` in its order; each leaves a file per rank when it has passed."""
    folder = Path(sys.argv[1])
    if not dist.is_initialized():
        # A rank that waits for one that failed must not wait for long.
        dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    for name, check in list(namespace.items()):
        if name.startswith("check_"):
            check(folder / name.removeprefix("check_"))
            (folder / f"{name}-{dist.get_rank()}").touch()
            dist.barrier()
    leave_group()


def gather(value: object) -> list[object]:
    """Return every rank's value, in the order of the ranks."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
