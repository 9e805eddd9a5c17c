"""How tests ask the command."""

import atexit
import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryFile
from typing import Any

import pytest

from nemo_rng_dcp.cli.main import main
from tests.support.jobs import LIMIT_SECONDS, job
from tests.support.streams import unmoved

INSTALLED = str(Path(sys.executable).with_name("nemo-rng-dcp"))
Capture = pytest.CaptureFixture[str]


def run(
    *arguments: object, program: Callable[[Sequence[str]], int] = main
) -> CompletedProcess[str]:
    """Run the command in a process of its own.

    A start of Python imports torch for seconds. This one is a fork that has it, and else like a
    start: stdout, stderr and signals are its own, and the end is the one that Python makes.

    Args:
        arguments: The words of the command line.
        program: A function at the top level of a module, which calls ``main``.
    """
    [done] = job(1, _run, program, [*map(str, arguments)], group=False)
    return done


def _run(program: Callable[[Sequence[str]], int], words: list[str]) -> CompletedProcess[str]:
    # Its thread is not in a fork, whose end would wait for it.
    faulthandler.cancel_dump_traceback_later()
    with TemporaryFile("w+") as out, TemporaryFile("w+") as error:
        if (child := os.fork()) == 0:
            signal.alarm(int(LIMIT_SECONDS))
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            _start(program, words)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, error):
            file.seek(0)
        return CompletedProcess(words, code, out.read(), error.read())


def _start(program: Callable[[Sequence[str]], int], words: list[str]) -> None:
    sys.stdout = os.fdopen(1, "w", closefd=False)  # with a buffer, as Python has it by itself
    # From Python 3.13 on, a process of multiprocessing forgets what was to run at its end. torch's
    # finalizers would run so late that they fail.
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
    code = 1
    try:
        code = program(words)
    except BaseException:
        traceback.print_exc()
    # What stdout still holds is written now, or the code is 120: as at the end of Python.
    ctypes.pythonapi.Py_Exit(code)


def ask(capsys: Capture, *arguments: object) -> tuple[int, str]:
    """Run the command in this process, which takes no seconds to start and moves no stream.

    Returns:
        The exit code, and what was printed with single spaces, so that no line's end matters.
    """
    with unmoved():
        code = main([*map(str, arguments)])
    out, error = capsys.readouterr()
    assert max(map(len, out.splitlines()), default=0) <= 80, out
    return code, " ".join((out + error).split())


def ask_json(capsys: Capture, *arguments: object) -> Any:
    """Run the command with ``--json`` and return what it printed."""
    with unmoved():
        code = main([*map(str, arguments), "--json"])
    assert code in (0, 1)
    return json.loads(capsys.readouterr().out)
