"""Timing in turns, and whether a target was met. All seconds are CPU seconds of this process.

Other jobs on the machine hardly change CPU time, as they do the time on the clock.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

_Result = TypeVar("_Result")


def cpu_seconds(call: Callable[[], _Result]) -> tuple[float, _Result]:
    """Return the seconds that a call takes in all threads of the process, and its result."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


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
        gc.collect()
        for name, call in calls.items():
            spent, _ = cpu_seconds(partial(_repeated, call, repeat))
            if round_number >= 0:
                seconds[name].append(spent / repeat)
    return seconds


def _repeated(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


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


@dataclass(frozen=True)
class Target:
    """A number that has a limit, and whether it keeps to it.

    Attributes:
        found: The number.
        limit: What is asked of it, ``at most 2.5x``.
        verdict: ``met``, ``MISSED`` or ``too noisy to say``.
    """

    found: str
    limit: str
    verdict: str

    @classmethod
    def at_most(cls, limit: float, found: float, unit: str = "") -> Target:
        """Judge a number that is the same in every run, or far from its limit."""
        verdict = "met" if found <= limit else "MISSED"
        return cls(f"{found:.3g}{unit}", f"at most {limit:g}{unit}", verdict)

    @classmethod
    def at_least(cls, limit: float, found: float, unit: str = "") -> Target:
        """Judge a number that is far from its limit."""
        verdict = "met" if found >= limit else "MISSED"
        return cls(f"{found:.3g}{unit}", f"at least {limit:g}{unit}", verdict)

    @classmethod
    def ratio(cls, limit: float, ours: Sequence[float], theirs: Sequence[float]) -> Target:
        """Judge how many times as much ours is as theirs, the values being paired by round.

        It is met or missed only if the median of ``ours - limit * theirs`` is on that side of 0
        with some 95% confidence, which is between the values sqrt(n) places below and above the
        middle.
        """
        above = sorted(a - limit * b for a, b in zip(ours, theirs, strict=True))
        middle, reach = len(above) / 2, math.sqrt(len(above))
        low = above[max(math.floor(middle - reach), 0)]
        high = above[min(math.ceil(middle + reach), len(above)) - 1]
        verdict = "too noisy to say" if low <= 0 < high else "met" if high <= 0 else "MISSED"
        found = statistics.median(ours) / statistics.median(theirs)
        return cls(f"{found:.2f}x", f"at most {limit:g}x", verdict)
