"""Interleaved timing, medians and spread, and whether a target was met."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a measurement; seconds, unless said otherwise."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, unit: float, digits: int = 1, sign: str = "") -> str:
        """Return ``median [low, high]`` in a unit of so many seconds."""
        numbers = (self.median / unit, self.low / unit, self.high / unit)
        median, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
        return f"{median} [{low}, {high}]"


@dataclass(frozen=True)
class Target:
    """A number that is to stay at or below a limit, and whether it did."""

    what: str
    found: float
    limit: float
    verdict: str

    @classmethod
    def at_most(cls, limit: float, what: str, values: Sequence[float]) -> Target:
        """Judge the median of what was measured, one value a round.

        It is met or missed only if the true median is on that side of the limit with some 95%
        confidence, which is between the values sqrt(n) places below and above the middle.
        """
        ordered, reach = sorted(values), math.sqrt(len(values))
        low = ordered[max(math.floor(len(values) / 2 - reach), 0)]
        high = ordered[min(math.ceil(len(values) / 2 + reach), len(values)) - 1]
        if low <= limit < high:
            verdict = "too noisy to say"
        else:
            verdict = "met" if high <= limit else "MISSED"
        return cls(what, statistics.median(values), limit, verdict)

    def text(self) -> str:
        return f"{self.what}: {self.found:.3g}, at most {self.limit:g}: {self.verdict}"


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, repeat: int
) -> dict[str, list[float]]:
    """Return the seconds of one call in every round: A B A B, after a round that only warms up.

    Args:
        calls: What to time, by name.
        rounds: How many values to return for each.
        repeat: Calls that one value is the mean of.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(-1, rounds):
        for name, call in calls.items():
            gc.collect()
            started = time.perf_counter()
            for _ in range(repeat):
                call()
            if round_number >= 0:
                seconds[name].append((time.perf_counter() - started) / repeat)
    return seconds


def rotated(names: Sequence[str], places: int) -> list[str]:
    """Return the names with so many of them moved from the front to the back, round and round."""
    start = places % len(names)
    return [*names[start:], *names[:start]]


def differences(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return what each round's value is above the same round's base."""
    return [value - other for value, other in zip(values, base, strict=True)]


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit ``value = factor * size ** exponent`` by least squares in log-log; return the exponent.

    Needs two sizes.
    """
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(value) for value in values]
    ).slope


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
