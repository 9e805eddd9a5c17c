"""Several jobs of different sizes inside one launch: each is a real process group of its own."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from scripts.demo import leaving

Result = TypeVar("Result")
TIMEOUT_SECONDS = 60
RANK = int(os.environ.get("RANK", "0"))


def job(size: int, path: Path, function: Callable[[], Result]) -> Result | None:
    """Run ``function`` as one job on the first ``size`` processes; the others wait for its end.

    Returns:
        The function's result on the job's own ranks, ``None`` elsewhere.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = path.with_suffix(".done")
    result = None
    if size > RANK:
        store = dist.FileStore(str(path.with_suffix(".store")), size)
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=RANK, world_size=size, timeout=timeout)
        result = function()
        dist.barrier()
        if RANK == 0:
            done.touch()
        dist.destroy_process_group()
    wait_for(done)
    return result


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not all(file.exists() for file in files):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still missing: {[file.name for file in files]}")
        time.sleep(0.005)


def run(namespace: dict[str, Callable[[Path], None]]) -> None:
    """Run every ``check_*`` in its order; each leaves a file per rank when it has passed."""
    folder = Path(sys.argv[1])
    for name, check in list(namespace.items()):
        if name.startswith("check_"):
            check(folder / name.removeprefix("check_"))
            (folder / f"{name}-{RANK}").touch()
            processes = range(int(os.environ["WORLD_SIZE"]))
            wait_for(*(folder / f"{name}-{rank}" for rank in processes))
    time.sleep(leaving.SECONDS)  # see there: the groups are destroyed, gloo's threads may not be
