"""Forks of one process that has imported torch, which takes a process seconds.

It is the standard library's fork server. Where pytest runs the tests in several processes, they
are forks of one server as well: see workers.py.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT: Any = multiprocessing.get_context("forkserver")
_IMPORTED = "tests.support.imported"
_CONTEXT.set_forkserver_preload([_IMPORTED])


def preload(*modules: str) -> None:
    """Have the fork server import these as well, those that there are; before the first fork."""
    _CONTEXT.set_forkserver_preload([_IMPORTED, *modules])


def fork(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a fork of the fork server, which has imported torch and nothing of ours."""
    process: BaseProcess = _CONTEXT.Process(target=_call, args=(function, arguments))
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    """Return two ends of a pipe, each of which a fork can be given."""
    ends: tuple[Connection, Connection] = _CONTEXT.Pipe()
    return ends


@contextmanager
def of_this_process() -> Iterator[None]:
    """Have forks of this process as it is now, and not of the fork server."""
    global _CONTEXT
    before, _CONTEXT = _CONTEXT, multiprocessing.get_context("fork")
    try:
        yield
    finally:
        _CONTEXT = before


def _call(function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    # A process of a fork server starts its own processes with another one: that imports torch anew.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    function(*arguments)
