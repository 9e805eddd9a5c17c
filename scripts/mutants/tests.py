"""Which tests reach a function, and how long they take: noted in a run without a fault."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OWN = 5
"""A module's own tests notice a fault so much more often than others."""


class Notes:
    """A plugin for the run without a fault; ``trampoline.py`` writes to the same file.

    The file has lines of JSON: ``["took", test, seconds]``, ``["failed", test, why]`` and
    ``["reached", test, function]``. A file instead of a test is what its tests share: a fixture.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        os.environ["MUTANTS_NOTES"] = str(file)

    def note(self, *values: object) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed:
            self.note("took", report.nodeid, report.duration)
        elif report.failed:
            self.note("failed", report.nodeid, report.longreprtext)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        with _naming(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope != "module":
            return (yield)
        begin = time.monotonic()
        with _naming(request.node):
            result = yield
        self.note("took", request.node.nodeid, time.monotonic() - begin)
        return result


class Quickest:
    """A plugin for a run with a fault: some tests, the quickest files first, until one fails.

    Args:
        seconds: By test, how long it takes.
        module: The last part of the name of the changed module; its own file of tests is the first.
    """

    def __init__(self, seconds: dict[str, float], module: str = "") -> None:
        self.seconds = seconds
        # Files stay in one piece: between two of them pytest takes down what a file's tests share.
        costs: dict[str, float] = defaultdict(float)
        for test, cost in seconds.items():
            costs[_file(test)] += cost / OWN if _is_own(test, module) else cost
        files = sorted(costs, key=lambda file: (costs[file], file))
        self._places = {file: place for place, file in enumerate(files)}
        self.batches = [batch for batch in (files[:3], files[3:9], files[9:]) if batch]
        """Files to run together: to collect those that are not needed takes seconds."""

    def pytest_configure(self, config: Any) -> None:
        config.option.maxfail = 1

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        chosen = [item for item in items if item.nodeid in self.seconds]
        items[:] = sorted(chosen, key=lambda item: self._places[_file(item.nodeid)])


@contextmanager
def _naming(node: Any) -> Iterator[None]:
    os.environ["MUTANTS_TEST"] = node.nodeid
    try:
        yield
    finally:
        del os.environ["MUTANTS_TEST"]


def kept_notes(file: str) -> Path:
    """Return where the notes on a file of tests are kept, until it or what it imports changes."""
    sources = [path for path in Path().rglob("*.py") if not path.name.startswith("test_")]
    digest = hashlib.sha256()
    for path in [*sorted(sources), Path(file)]:
        digest.update(path.read_bytes())
    folder = Path().resolve().with_name("mutants-notes")
    folder.mkdir(exist_ok=True)
    return folder / f"{Path(file).stem}-{digest.hexdigest()[:16]}.jsonl"


def by_length(files: list[str]) -> list[str]:
    """Return the files with those first that take longest."""
    longest: list[Path] = importlib.import_module("tests.conftest").LONGEST
    return sorted(files, key=lambda file: Path(file).resolve() not in longest)


def by_function(
    files: Iterable[Path], left: float
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return all good tests with their seconds; and by function the quickest that reach it.

    Args:
        files: The notes.
        left: The seconds for the tests of one function, by what they took without a fault.
    """
    notes = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    failed = {test: why for kind, test, why in notes if kind == "failed"}
    for test, why in sorted(failed.items()):
        print(f"left out, since it fails without a fault: {test}\n{why}")
    seconds: dict[str, float] = defaultdict(float)
    fixtures: dict[str, float] = defaultdict(float)
    for kind, test, noted in notes:
        if kind == "took" and test not in failed:
            (seconds if "::" in test else fixtures)[test] += noted
    tests: dict[str, set[str]] = defaultdict(set)
    for test in seconds:
        tests[test].add(test)
        tests[_file(test)].add(test)
    reaching: dict[str, set[str]] = defaultdict(set)
    for kind, test, function in notes:
        if kind == "reached":
            reaching[function] |= tests[test]
    return seconds, {
        function: _quickest(
            {test: seconds[test] for test in its_tests}, fixtures, left, function.split(".")[-2]
        )
        for function, its_tests in reaching.items()
    }


def _quickest(
    seconds: dict[str, float], fixtures: dict[str, float], left: float, module: str
) -> dict[str, float]:
    """Return as many as there is time for; the first of a file waits for what its tests share.

    The module's own come as if they took less: most tests reach what every save does.
    """
    chosen: dict[str, float] = {}
    waited_for: set[str] = set()
    costs = {test: seconds[test] / (OWN if _is_own(test, module) else 1) for test in seconds}
    for test in sorted(seconds, key=costs.__getitem__):
        file = _file(test)
        cost = seconds[test] + (0 if file in waited_for else fixtures.get(file, 0))
        if cost <= left:
            left -= cost
            waited_for.add(file)
            chosen[test] = seconds[test]
    return chosen


def _is_own(test: str, module: str) -> bool:
    return _file(test).endswith(f"/test_{module}.py")


def _file(test: str) -> str:
    return test.partition("::")[0]
