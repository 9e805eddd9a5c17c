"""The processes in which xdist runs tests, as forks: torch is imported once for all of them.

execnet starts such a process by a command, talks to it over its stdin and stdout, and sends it the
code to run.
"""

import os
import sys
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from execnet import gateway_base, gateway_io

from tests.support.forks import fork

# Since Python 3.14 a fork server asks for a key, which the processes that run tests have not. They
# begin servers of their own, which import torch anew.
SHARED = not hasattr(forkserver._forkserver, "_forkserver_authkey")  # type: ignore[attr-defined]


def fork_workers() -> None:
    """Have the processes that run the tests be forks of this process's fork server."""
    gateway_io.Popen2IOMaster = Worker


class Worker(gateway_base.Popen2IO):  # type: ignore[misc]
    """What execnet holds of a process that it has started."""

    def __init__(self, command: list[str], execmodel: Any) -> None:
        stdin, ours = os.pipe()
        theirs, stdout = os.pipe()
        with Connection(stdin) as reader, Connection(stdout) as writer:
            self.process = fork(_work, reader, writer, command[-1])
        super().__init__(os.fdopen(ours, "wb"), os.fdopen(theirs, "rb"), execmodel)

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def _work(stdin: Connection, stdout: Connection, code: str) -> None:
    # What it forks are forks of the same server. The standard library means to do so, but looks
    # for the server among the children of this process.
    if SHARED:
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    os.dup2(stdin.fileno(), 0)
    os.dup2(stdout.fileno(), 1)
    stdin.close()
    stdout.close()
    sys.stdin = os.fdopen(0, closefd=False)
    exec(code, {"__name__": "__main__"})
