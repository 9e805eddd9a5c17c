"""The processes of ranks, and the server of which they are forks.

To import a test's module, with the library and what else it needs, takes longer than most jobs.
So a fork of the process that has imported torch (see forks.py), the server here, imports the
modules of the tests as jobs name them: one for each pytest process. Every rank is a fork of that,
with a process, streams and signals of its own.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from tests.support import forks

GRACE_SECONDS = 2
"""When a rank has failed, the others have this long to fail by themselves and say where."""


class Request(NamedTuple):
    """What the ranks of a job are told."""

    folder: Path
    size: int
    environment: dict[str, str]
    place: str
    path: list[str]
    limit: float
    grace: float
    call: bytes
    """The function and its arguments, pickled: each rank has its own."""


class Outcome(NamedTuple):
    """How the ranks of a job ended: which one failed first, and their exit codes."""

    failed: int | None
    codes: list[int]


def output(folder: Path, rank: int) -> Path:
    """Return the file of what a rank prints."""
    return folder / f"{rank}.output"


def result(folder: Path, rank: int) -> Path:
    """Return the file of what a rank returns."""
    return folder / f"{rank}.result"


class _Server:
    """The server as a pytest process sees it; it ends with that."""

    def __init__(self) -> None:
        self.requests, requests = forks.pipe()
        self.process = forks.fork(_serve, requests, self.requests)
        requests.close()
        # multiprocessing would wait for it for ever: this comes before, in its own processes too.
        self.end = util.Finalize(None, self.close, exitpriority=0)

    def run(self, request: Request) -> Outcome:
        """Run a job to its end. What interrupts the wait ends the ranks, and the server."""
        try:
            self.requests.send(request)
            outcome: Outcome = self.requests.recv()
            return outcome
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        server.cache_clear()
        self.end.cancel()
        self.requests.close()
        self.process.join()


@cache
def server() -> _Server:
    """Return the server of this process."""
    return _Server()


@contextmanager
def forks_of_this_process() -> Iterator[None]:
    """Have ranks that are forks of this process as it is now, and not of the fork server."""
    with forks.of_this_process():
        server()
    try:
        yield
    finally:
        server().close()


def _serve(requests: connection.Connection, other_end: connection.Connection) -> None:
    other_end.close()  # a fork has it, too, and would wait for itself
    # An interrupt is for pytest, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):
        while True:
            request: Request = requests.recv()
            os.environ.clear()
            # Modules of tests ask for a GPU. CUDA that was asked itself does not work in forks.
            os.environ.update(request.environment, PYTORCH_NVML_BASED_CUDA_CHECK="1")
            os.chdir(request.place)
            sys.path[:] = request.path
            # This imports all that the call names. Where it fails, it fails in the ranks too.
            with suppress(Exception):
                pickle.loads(request.call)
            # A collection in a rank would copy every page that has an object of today.
            gc.collect()
            gc.freeze()
            requests.send(_outcome(request, requests))


def _outcome(request: Request, requests: connection.Connection) -> Outcome:
    ranks: list[BaseProcess] = []
    context = multiprocessing.get_context("fork")
    try:
        for rank in range(request.size):
            process = context.Process(target=_run, args=(rank, request))
            process.start()
            ranks.append(process)
        failed = _first_to_fail(ranks, request, requests)
    finally:
        _end(ranks, request.grace)
    return Outcome(failed, [int(rank.exitcode or 0) for rank in ranks])


def _first_to_fail(
    ranks: list[BaseProcess], request: Request, requests: connection.Connection
) -> int | None:
    """Wait until all ranks have ended, but not for long once one of them has failed."""
    # Not the sentinels: processes that a rank has started would hold them open.
    running: dict[Any, int] = {
        os.pidfd_open(process.pid): rank for rank, process in enumerate(ranks)
    }
    failed, deadline = None, float("inf")
    while running and (left := deadline - time.monotonic()) > 0:
        for ready in connection.wait([*running, requests], None if failed is None else left):
            if ready is requests:
                raise EOFError  # nobody waits for this job
            rank = running.pop(ready)
            os.close(ready)
            ranks[rank].join()
            # A function can end its process with 0 and never return.
            passed = ranks[rank].exitcode == 0 and result(request.folder, rank).exists()
            if failed is None and not passed:
                failed, deadline = rank, time.monotonic() + request.grace
    for left_over in running:
        os.close(left_over)
    return failed


def _end(ranks: list[BaseProcess], grace: float) -> None:
    """End what is still running."""
    for process in ranks:
        process.terminate()
    for process in ranks:
        process.join(grace)
        process.kill()
        process.join()


def print_to(path: Path) -> None:
    """Have this process print to a file from now on."""
    with path.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _run(rank: int, request: Request) -> None:
    """What the process of a rank does; multiprocessing then ends it without Python's shutdown."""
    print_to(output(request.folder, rank))
    # A shell ignores interrupts in what it starts in the background, and so would this rank.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Whatever ends this rank, its last words are where it was.
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    faulthandler.dump_traceback_later(request.limit, exit=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    # Before Python 3.12 a fork hangs if a thread of gloo asks for the interpreter in that moment
    # (cpython issue 112275), as one may right after a collective.
    os.register_at_fork(before=partial(time.sleep, 0.02))
    torch.set_num_threads(1)
    # Forks share NumPy's stream, fresh processes do not; Python reseeds its own in every fork.
    np.random.seed()
    function: Callable[..., object]
    function, arguments = pickle.loads(request.call)
    result(request.folder, rank).write_bytes(pickle.dumps(function(*arguments)))
    # Nobody leaves while another rank still talks to it. Without sockets: the group may be gone.
    end = dist.FileStore(str(request.folder / "end"), request.size)
    end.set(str(rank), "")
    end.wait([str(other) for other in range(request.size)], timedelta(seconds=request.limit))
