"""Which tests reach a function, and how long they take: noted in a run without a fault."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TESTS_SECONDS = 100
"""How long the tests of one fault may take, by what they took without it."""

OWN = 5
"""A module's own tests notice a fault so much more often than others."""


class Notes:
    """A plugin for the run without a fault; ``trampoline.py`` writes to the same file.

    The file has lines of JSON: ``["took", test, seconds]``, ``["failed", test, null]`` and
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
            self.note("failed", report.nodeid, None)

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
            costs[_file(test)] += cost / OWN if _file(test).endswith(f"/test_{module}.py") else cost
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


def by_function(file: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return all good tests with their seconds; and by function the quickest that reach it."""
    notes = [json.loads(line) for line in file.read_text().splitlines()]
    failed = {test for kind, test, _ in notes if kind == "failed"}
    if failed:
        print(f"left out, since they fail without a fault: {', '.join(sorted(failed))}")
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
        function: _quickest({test: seconds[test] for test in its_tests}, fixtures)
        for function, its_tests in reaching.items()
    }


def _quickest(seconds: dict[str, float], fixtures: dict[str, float]) -> dict[str, float]:
    """Return as many as there is time for; the first of a file waits for what its tests share."""
    chosen: dict[str, float] = {}
    left, waited_for = float(TESTS_SECONDS), set()
    for test in sorted(seconds, key=lambda test: seconds[test]):
        file = _file(test)
        cost = seconds[test] + (0 if file in waited_for else fixtures.get(file, 0))
        if cost <= left:
            left -= cost
            waited_for.add(file)
            chosen[test] = seconds[test]
    return chosen


def _file(test: str) -> str:
    return test.partition("::")[0]
