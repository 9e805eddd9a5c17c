"""Plant faults in the library, one at a time, and look whether the tests that reach them notice.

mutmut makes the faults. Its own runner would not see what happens in other processes. Here the
suite runs once without a fault, and notes which tests reach which function, in the forked ranks
as well. Then each fault is a fork of a process that has imported everything. It runs the tests
that reach the changed function, the quickest files first, for 100 seconds at most.

    python -m scripts.mutants                        the library, a sample that ends in an hour
    python -m scripts.mutants --only planner record  these modules alone
    python -m scripts.mutants --faults NAME...       these faults alone, those of a busy machine
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.mutants.faults import Fault

LEFT_OUT = ("frameworks", "libraries", "peers")
"""Folders of tests/ whose tests are not in the default run."""

NO_TESTS = 5
"""pytest's exit code when it ran none."""


def main() -> int:
    # Not at the top: ranks import this file, as every process of multiprocessing does.
    from scripts.mutants.faults import FOLDER, copy_checkout, library_modules, plant
    from scripts.mutants.tests import Notes, Quickest, by_function, by_length, kept_notes

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=library_modules(), metavar="MODULE")
    parser.add_argument("--faults", nargs="*", metavar="NAME", help="these alone")
    parser.add_argument("--count", type=int, help="how many faults; left out: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tests", nargs="*", default=["tests"], help="only those in these folders")
    parser.add_argument("--seconds", type=float, default=100.0, help="for one fault's tests")
    parser.add_argument("--minutes", type=float, default=57.0, help="start none after this")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes

    copy_checkout()
    faults = [fault for module in arguments.only for fault in plant(module)]
    print(f"{len(faults)} faults can be planted in {', '.join(arguments.only)}")
    random.Random(arguments.seed).shuffle(faults)
    if arguments.faults:
        faults = [fault for fault in faults if fault.name in arguments.faults]

    paths = {path for name in arguments.tests for path in (FOLDER / name).glob("**/test_*.py")}
    files = sorted(str(path.relative_to(FOLDER)) for path in paths)
    files = [file for file in files if Path(file).parts[1] not in LEFT_OUT]
    os.chdir(FOLDER)
    sys.path.insert(0, str(FOLDER))
    prepare(files)
    notes = {file: kept_notes(file) for file in files}
    left = [file for file in by_length(files) if not notes[file].exists()]
    at_work: dict[int, str] = {}
    while left or at_work:
        while left and len(at_work) < arguments.jobs:
            file = left.pop(0)
            begun = notes[file].with_suffix(".begun")
            begun.write_text("")
            at_work[fork("stats", [[file]], Notes(begun))] = file
        pid, status = os.wait()
        file = at_work.pop(pid)
        begun = notes[file].with_suffix(".begun")
        passed = os.waitstatus_to_exitcode(status) in (0, NO_TESTS)
        notes[file] = begun.rename(notes[file]) if passed else begun
    good, reaching = by_function(notes.values(), arguments.seconds)
    print(f"{len(reaching)} functions are reached by tests", flush=True)

    tried: list[Fault] = []
    missed: list[Fault] = []
    running: dict[int, tuple[Fault | None, float]] = {}
    started: dict[int, float] = {}
    slow: set[int] = set()
    # The first one is no fault at all: the tests must pass then, in their new order.
    todo: list[Fault | None] = [None, *faults[: arguments.count]]
    while True:
        while todo and len(running) < arguments.jobs and time.monotonic() < deadline:
            fault = todo.pop(0)
            own = fault.module.rpartition(".")[2] if fault else ""
            tests = Quickest(reaching.get(fault.function, {}) if fault else good, own)
            pid = fork(fault.name if fault else "none", tests.batches, tests)
            # Tests that take twice as long have noticed a fault.
            limit = 2 * arguments.seconds if fault else 60 * arguments.minutes
            running[pid] = fault, time.monotonic() + limit
            started[pid] = time.monotonic()
        if not running:
            break
        pid, code = wait({pid: ends for pid, (_, ends) in running.items()}, slow)
        fault, _ = running.pop(pid)
        took = time.monotonic() - started[pid]
        if fault is None:
            if code:
                sys.exit(f"the tests fail without any fault, pytest ended with {code}")
            print(f"the tests pass without a fault, in {took:.0f} s", flush=True)
            continue
        tried.append(fault)
        if code not in (0, NO_TESTS):
            how = "by the time limit" if pid in slow else f"in {took:.1f} s"
            print(f"noticed {how}: {fault.name}", flush=True)
        else:
            missed.append(fault)
            print(f"\nNOT NOTICED {fault.name}\n{fault.diff()}", flush=True)
    report(tried, missed)
    print(f"{len(slow)} of them by the time limit of {2 * arguments.seconds:.0f} s")
    return 0


def prepare(files: list[str]) -> None:
    """Import what all tests need, and start the server of which the ranks of all are forks."""
    import pytest

    with silenced():
        pytest.main(["--collect-only", "-qq", *files])
    forkserver.ensure_running()


def fork(name: str, batches: list[list[str]], plugin: object) -> int:
    """Start tests with one fault, batches of files until one fails; return the process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    # The server is another process's child, which this one may not ask after.
    server: Any = forkserver._forkserver
    server.ensure_running = lambda: None
    os.environ["MUTANT_UNDER_TEST"] = name
    import pytest

    code = 1
    try:
        with silenced():
            options = ["-q", "-p", "no:cacheprovider"]
            codes = (int(pytest.main([*options, *files], [plugin])) for files in batches)
            code = next((code for code in codes if code not in (0, NO_TESTS)), 0)
    finally:
        os._exit(code)


@contextmanager
def silenced() -> Iterator[None]:
    """Print nothing."""
    sys.stdout.flush()
    streams = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
            os.close(stream)


def wait(deadlines: dict[int, float], slow: set[int]) -> tuple[int, int]:
    """Return the process that ends first and its code; one that takes too long is ended."""
    while True:
        for pid, deadline in deadlines.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return pid, os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline and pid not in slow:
                slow.add(pid)
                os.kill(pid, signal.SIGINT)  # so that it ends its ranks, too
            elif time.monotonic() > deadline + 20:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def report(tried: list[Fault], missed: list[Fault]) -> None:
    print("\n| module | planted | noticed |\n|---|---:|---:|")
    for module in sorted({fault.module for fault in tried}):
        count, left = (
            sum(fault.module == module for fault in faults) for faults in (tried, missed)
        )
        print(f"| {module.removeprefix('nemo_rng_dcp.')} | {count} | {count - left} |")
    noticed = len(tried) - len(missed)
    print(f"| all | {len(tried)} | {noticed} ({100 * noticed / max(len(tried), 1):.1f}%) |")


if __name__ == "__main__":
    sys.exit(main())
