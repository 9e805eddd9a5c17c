"""Plant faults in the library, one at a time, and look whether the tests nearest to them notice.

mutmut makes the faults. Its own runner would run every test that touches a function, and would not
see what happens in other processes. Here each module has its nearest tests, each fault is a fork of
a process that has imported everything, and the forked ranks of a test meet the fault as well.

    python scripts/mutants.py                        all modules, a sample that ends in an hour
    python scripts/mutants.py --only planner record  these modules alone
"""

from __future__ import annotations

import argparse
import difflib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("nemo_rng_dcp")
FOLDER = ROOT / "runs" / "mutants"

CLEAN = FOLDER / "clean.txt"
NO_FAULT = "none"
LIMIT_SECONDS = 400
"""Tests that take longer have noticed a fault."""

NEAREST = {
    "record": ["record", "head", "layout_1", "hash_seed", "layout", "stateful"],
    "resume": ["head", "record", "hash_seed", "stateful", "elastic"],
    "layout": ["layout", "stateful", "meshes", "elastic", "simulated_device"],
    "snapshot": ["snapshot", "scoped", "faults", "stateful", "generators"],
    "planner": ["planner", "elastic", "meshes"],
    "stateful": [
        "stateful",
        "head",
        "peers",
        "save_and_load",
        "meshes",
        "elastic",
        "first_forward",
    ],
    "standalone": ["standalone"],
    "first_forward": ["first_forward"],
    "peers": ["peers", "meshes", "elastic", "simulated_device"],
    "scoped": ["scoped", "simulated_device"],
    "seeding": ["seeding", "derive", "stateful", "dataloader"],
    "automodel": ["automodel", "stateful", "simulated_device"],
    "determinism": ["determinism", "simulated_device"],
    "device": ["simulated_device"],
    "generators/mt19937": ["mt19937", "generators", "stateful"],
    "generators/numpy_random": ["generators", "mt19937", "stateful"],
    "generators/python_random": ["generators", "mt19937", "stateful"],
    "generators/torch_random": ["generators", "stateful", "simulated_device"],
    "generators/registry": ["generators", "stateful", "simulated_device"],
}
"""The tests nearest to each module, those first that are likely to notice."""


@dataclass
class Fault:
    """One fault; ``diff`` is what it changes."""

    module: str
    name: str
    diff: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(NEAREST), metavar="MODULE")
    parser.add_argument("--count", type=int, help="how many faults; left out: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=55.0, help="start none after this")
    arguments = parser.parse_args()
    unknown = set(arguments.only) - NEAREST.keys()
    if unknown:
        parser.error(f"no module {', '.join(sorted(unknown))}; there are {', '.join(NEAREST)}")
    deadline = time.monotonic() + 60 * arguments.minutes

    shutil.rmtree(FOLDER, ignore_errors=True)
    for folder in ("tests", "scripts", str(PACKAGE)):
        shutil.copytree(ROOT / folder, FOLDER / folder)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, FOLDER)
    faults = [fault for module in arguments.only for fault in plant(module)]
    print(f"{len(faults)} faults can be planted in {', '.join(arguments.only)}")
    random.Random(arguments.seed).shuffle(faults)
    faults = faults[: arguments.count]

    prepare()
    planted: dict[str, int] = dict.fromkeys(arguments.only, 0)
    missed: list[Fault] = []
    running: dict[int, tuple[Fault, float]] = {}
    slow: set[int] = set()
    # The first one is no fault at all: the tests must pass then.
    todo = iter([Fault("", NO_FAULT, ""), *faults])
    while True:
        while len(running) < arguments.jobs and time.monotonic() < deadline:
            fault = next(todo, None)
            if fault is None:
                break
            tests = files(*([fault.module] if fault.module else arguments.only))
            limit = LIMIT_SECONDS if fault.module else 60 * arguments.minutes
            running[fork(fault.name, tests)] = fault, time.monotonic() + limit
        if not running:
            break
        pid, code = wait({pid: ends for pid, (_, ends) in running.items()}, slow)
        fault, _ = running.pop(pid)
        if not fault.module:
            if code:
                sys.exit(f"the tests fail without any fault: {CLEAN.read_text()[-5000:]}")
            continue
        planted[fault.module] += 1
        if code == 0:
            missed.append(fault)
            print(f"\nNOT NOTICED {fault.name}\n{fault.diff}", flush=True)
    report(planted, missed)
    print(f"{len(slow)} of them by the time limit of {LIMIT_SECONDS} s")
    return 0


def plant(module: str) -> Iterator[Fault]:
    """Write a module that can become any of its faulty selves; which one, the environment says."""
    # Not at the top: ranks import this file, as every process of multiprocessing does.
    import libcst
    from mutmut.mutation import file_mutation

    path = PACKAGE / f"{module}.py"
    source = (ROOT / path).read_text()
    tree, mutations, *ignored = file_mutation.create_mutations(str(path), source)
    mutations = [
        its
        for its in mutations
        if isinstance(its.contained_by_top_level_function, libcst.FunctionDef)
        and not is_prose(its, libcst)
    ]
    mutated = file_mutation.combine_mutations_to_source(tree, mutations, *ignored)
    (FOLDER / path).write_text(mutated.code)
    dotted = ".".join(path.with_suffix("").parts)
    for name, its in zip(mutated.mutant_names, mutations, strict=True):
        changed: Any = file_mutation.deep_replace(tree, its.original_node, its.mutated_node)
        lines = difflib.unified_diff(
            source.splitlines(), changed.code.splitlines(), lineterm="", n=1
        )
        yield Fault(module, f"{dotted}.{name}", "\n".join(list(lines)[2:]))


def is_prose(mutation: Any, libcst: Any) -> bool:
    """Return whether a fault is in a text for people: one with a space in it."""
    node = mutation.original_node
    return isinstance(node, libcst.SimpleString) and " " in node.value


def files(*modules: str) -> list[str]:
    """Return the tests nearest to some modules, each file once."""
    return list(dict.fromkeys(f"tests/test_{n}.py" for its in modules for n in NEAREST[its]))


def prepare() -> None:
    """Import what all tests need, and start the server of which the ranks of all are forks."""
    os.chdir(FOLDER)
    sys.path[:0] = [str(FOLDER), str(FOLDER / "tests"), str(FOLDER / "scripts")]
    import pytest

    with silenced(os.devnull):
        pytest.main(["--collect-only", "-qq", *files(*NEAREST)])
    forkserver.ensure_running()


def fork(name: str, tests: list[str]) -> int:
    """Start tests with one fault; return the process."""
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
        # mutmut calls a function through one of its own, so a warning names another line.
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", "not names_the_line"]
        with silenced(CLEAN if name == NO_FAULT else os.devnull):
            code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


@contextmanager
def silenced(path: Path | str) -> Iterator[None]:
    """Send what is printed to a file."""
    sys.stdout.flush()
    streams = [os.dup(1), os.dup(2)]
    with open(path, "w") as file:
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


def report(planted: dict[str, int], missed: list[Fault]) -> None:
    print("\n| module | planted | noticed |\n|---|---:|---:|")
    for module, count in planted.items():
        print(f"| {module} | {count} | {count - sum(its.module == module for its in missed)} |")
    total = sum(planted.values())
    share = 100 * (total - len(missed)) / max(total, 1)
    print(f"| all | {total} | {total - len(missed)} ({share:.1f}%) |")


if __name__ == "__main__":
    sys.exit(main())
