"""Jobs of several ranks inside a test: real processes and a real gloo group, in 0.1 s.

A launch of torchrun takes seconds, because every rank imports torch. Here the standard library's
fork server imports torch once for each pytest process, and every rank is a fork of it, with a
process, streams and signals of its own.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

Result = TypeVar("Result")

LIMIT_SECONDS = 100
"""A rank that takes longer prints where it is and ends itself."""

GRACE_SECONDS = 2
"""When a rank has failed, the others have this long to fail by themselves and say where."""

_CONTEXT = multiprocessing.get_context("forkserver")
# Not nemo_rng_dcp: the server can have another path than the test, and thus another copy of it.
# DCP's first save and load import the last two.
_PRELOADED = ["pytest", "torch.distributed.checkpoint", "torch._dynamo", "fsspec"]
_CONTEXT.set_forkserver_preload(_PRELOADED)


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
    with TemporaryDirectory(prefix="job-") as folder:
        environment = {
            **os.environ,
            "JOB_STORE": f"{folder}/store",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        ranks = [_Rank(rank, Path(folder)) for rank in range(size)]
        try:
            for rank in ranks:
                rank.start(environment, limit, group, function, args)
            failed = _first_to_fail(ranks)
        finally:
            _end(ranks)
        if failed is None:
            return [rank.result() for rank in ranks]
        reports = "\n".join(rank.report() for rank in ranks)
    raise JobError(f"{function.__name__} failed on rank {failed.rank} of {size} first\n{reports}")


def preload(*modules: str) -> None:
    """Have the fork server import these as well, those that there are; before the first job."""
    _CONTEXT.set_forkserver_preload([*_PRELOADED, *modules])


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


class _Rank:
    """A rank as its test sees it."""

    process: BaseProcess

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.output = folder / f"{rank}.output"
        self.pickled = folder / f"{rank}.result"

    def start(self, *arguments: object) -> None:
        arguments = (self.rank, self.output, self.pickled, *arguments)
        self.process = _CONTEXT.Process(target=_run, args=arguments)
        self.process.start()

    def passed(self) -> bool:
        # A function can end its process with 0 and never return.
        return self.process.exitcode == 0 and self.pickled.exists()

    def result(self) -> Any:
        return pickle.loads(self.pickled.read_bytes())

    def report(self) -> str:
        code = self.process.exitcode
        assert code is not None
        end = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        printed = self.output.read_text(errors="replace") if self.output.exists() else ""
        return f"--- rank {self.rank} ended with {end} and printed:\n{printed}"


def _first_to_fail(ranks: list[_Rank]) -> _Rank | None:
    """Wait until all ranks have ended, but not for long once one of them has failed."""
    running = {rank.process.sentinel: rank for rank in ranks}
    failed, deadline = None, float("inf")
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in connection.wait(list(running), None if failed is None else left):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            rank.process.join()
            if failed is None and not rank.passed():
                failed, deadline = rank, time.monotonic() + GRACE_SECONDS
    return failed


def _end(ranks: list[_Rank]) -> None:
    """End what is still running."""
    started = [rank.process for rank in ranks if hasattr(rank, "process")]
    for process in started:
        process.terminate()
    for process in started:
        process.join(GRACE_SECONDS)
        process.kill()
        process.join()


def _run(
    rank: int,
    output: Path,
    pickled: Path,
    environment: dict[str, str],
    limit: float,
    group: bool,
    function: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    """What the process of a rank does; the fork server then ends it without Python's shutdown."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # A shell ignores interrupts in what it starts in the background, and so would this rank.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Whatever ends this rank, its last words are where it was.
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    faulthandler.dump_traceback_later(limit, exit=True)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    # A process of a fork server starts its own processes with another one: that imports torch anew.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    # Before Python 3.12 a fork hangs if a thread of gloo asks for the interpreter in that moment
    # (cpython issue 112275), as one may right after a collective.
    os.register_at_fork(before=partial(time.sleep, 0.02))
    torch.set_num_threads(1)
    # Forks share NumPy's stream, fresh processes do not; Python reseeds its own in every fork.
    np.random.seed()
    if group:
        begin_group(limit)
    pickled.write_bytes(pickle.dumps(function(*args)))
    # Nobody leaves while another rank still talks to it. Without sockets: the group may be gone.
    size = int(environment["WORLD_SIZE"])
    end = dist.FileStore(f"{environment['JOB_STORE']}-end", size)
    end.set(str(rank), "")
    end.wait([str(other) for other in range(size)], timedelta(seconds=limit))
