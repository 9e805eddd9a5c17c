"""Jobs of several ranks inside a test: real processes and a real gloo group, in 0.1 s.

A launch of torchrun takes seconds, because every rank imports torch. Here every rank is a fork of
a process that has imported torch and the test's module: see ranks.py.
"""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch.distributed as dist

from tests.support import ranks
from tests.support.forks import preload

__all__ = ["JobError", "begin_group", "gather", "job", "preload", "process_groups"]

Result = TypeVar("Result")

LIMIT_SECONDS = 100
"""A rank that takes longer prints where it is and ends itself."""


class JobError(Exception):
    """A rank failed; the message holds what every rank printed, tracebacks included."""


def job(
    size: int,
    function: Callable[..., Result],
    *args: object,
    group: bool = True,
    limit: float = LIMIT_SECONDS,
) -> list[Result]:
    """Run ``function(*args)`` on every rank of a new job, each rank a process of its own.

    pytest shows the values of a failed assertion in the test, but not in a rank: return what can
    be compared in the test.

    Args:
        size: Number of ranks, >= 1.
        function: A function at the top level of a module; the ranks import it by name.
        args: Anything that can be pickled.
        group: Whether the gloo process group exists before the call; if not, the function may
            call ``begin_group()``.
        limit: Seconds after which a rank ends itself.

    Returns:
        What the function returned on each rank, in the order of the ranks. It was pickled.

    Raises:
        JobError: A rank raised, died or took too long. No rank is left running.
    """
    __tracebackhide__ = True
    with TemporaryDirectory(prefix="job-") as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "JOB_STORE": f"{folder}/store",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        call = (_in_a_group, (limit, function, args)) if group else (function, args)
        seconds = (limit, ranks.GRACE_SECONDS)
        told = (environment, os.getcwd(), sys.path, *seconds, pickle.dumps(call))
        outcome = ranks.server().run(ranks.Request(folder, size, *told))
        if outcome.failed is None:
            files = [ranks.result(folder, rank) for rank in range(size)]
            return [pickle.loads(file.read_bytes()) for file in files]
        reports = "\n".join(_report(folder, *ended) for ended in enumerate(outcome.codes))
    raise JobError(
        f"{function.__name__} failed on rank {outcome.failed} of {size} first\n{reports}"
    )


def begin_group(limit: float = LIMIT_SECONDS) -> None:
    """Create the process group of a job that was started without one."""
    # A TCPStore asks the name server who 127.0.0.1 is, which can take 5 s; a file does not.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['JOB_STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=limit),
    )


def gather(value: Result) -> list[Result]:
    """Return every rank's value to every rank, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def process_groups() -> int:
    """Return how many process groups this rank has; torch has no public way to ask."""
    return len(dist.distributed_c10d._world.pg_map)


def _in_a_group(limit: float, function: Callable[..., Result], args: tuple[object, ...]) -> Result:
    begin_group(limit)
    return function(*args)


def _report(folder: Path, rank: int, code: int) -> str:
    end = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    output = ranks.output(folder, rank)
    printed = output.read_text(errors="replace") if output.exists() else ""
    return f"--- rank {rank} ended with {end} and printed:\n{printed}"
