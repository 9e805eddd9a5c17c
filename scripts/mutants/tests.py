"""Which tests reach a function, and how long they take: noted in a run without a fault."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TESTS_SECONDS = 60
"""How long the tests of one fault may take, by what they took without it."""


class Notes:
    """A plugin for the run without a fault; ``trampoline.py`` writes to the same file.

    The file has lines of JSON: ``[test, function]``, ``[test, seconds]`` or ``[test, "failed"]``. A
    file instead of a test stands for all tests in it, which share a fixture.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        os.environ["MUTANTS_NOTES"] = str(file)

    def pytest_runtest_logreport(self, report: Any) -> None:
        noted = report.duration if report.passed else report.outcome
        with self.file.open("a") as file:
            file.write(json.dumps([report.nodeid, noted]) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        with _naming(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope != "module":
            return (yield)
        with _naming(request.node):
            return (yield)


class Quickest:
    """A plugin for the run with a fault: some tests, the quickest first, up to one that fails."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def pytest_configure(self, config: Any) -> None:
        config.option.maxfail = 1

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        chosen = [item for item in items if item.nodeid in self.seconds]
        items[:] = sorted(chosen, key=lambda item: self.seconds[item.nodeid])


@contextmanager
def _naming(node: Any) -> Iterator[None]:
    os.environ["MUTANTS_TEST"] = node.nodeid
    try:
        yield
    finally:
        del os.environ["MUTANTS_TEST"]


def by_function(file: Path) -> dict[str, dict[str, float]]:
    """Return by function the tests that reach it and how long they take, a minute of them."""
    notes = [json.loads(line) for line in file.read_text().splitlines()]
    failed = {test for test, noted in notes if noted == "failed"}
    if failed:
        print(f"left out, since they fail without a fault: {', '.join(sorted(failed))}")
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[str, set[str]] = defaultdict(set)
    for test, noted in notes:
        if isinstance(noted, float) and test not in failed:
            seconds[test] += noted
            tests[test].add(test)
            tests[test.partition("::")[0]].add(test)
    reaching: dict[str, set[str]] = defaultdict(set)
    for test, noted in notes:
        if isinstance(noted, str):
            reaching[noted] |= tests[test]
    return {
        function: dict(_quickest((test, seconds[test]) for test in its_tests))
        for function, its_tests in reaching.items()
    }


def _quickest(tests: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    left = float(TESTS_SECONDS)
    for test, seconds in sorted(tests, key=lambda its: its[1]):
        if (left := left - seconds) < 0:
            return
        yield test, seconds
