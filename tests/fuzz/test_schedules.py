"""Logical ranks on random schedules of world sizes, against one uninterrupted run.

Group ``i`` is made of ``random.Random(f"{SEED} {i}")`` alone. A failure names its group; with
``FUZZ_FIRST=<group> FUZZ_SCHEDULES=3`` that group runs by itself. ``make fuzz`` plays 200.
"""

import os
import random
from pathlib import Path

import pytest

from tests.support.jobs import job
from tests.support.schedules import SIZES, Drawn, Segment, expected, play, schedule

SEED = os.environ.get("FUZZ_SEED", "1")
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
SCHEDULES = int(os.environ.get("FUZZ_SCHEDULES", "12"))
TOGETHER = 3
"""Schedules that go over the same sizes, so that their segments share a job's processes."""

GROUPS = range(FIRST, FIRST + max(1, SCHEDULES // TOGETHER))


def played(path: Path, sizes: list[int], seed: str, fault: str = "") -> list[tuple[Drawn, Drawn]]:
    """Play schedules over some world sizes; return what each drew, and what it should have."""
    schedules = [list(schedule(f"{seed} {i}", sizes)) for i in range(TOGETHER)]
    found: list[Drawn] = [{} for _ in schedules]
    for number, size in enumerate(sizes):
        for drawn in job(size, play, path, schedules, number, fault):
            for i, of_process in enumerate(drawn):
                for key, numbers in of_process.items():
                    assert found[i].setdefault(key, numbers) == numbers or fault, "drawn for all"
    return [
        (drawn, _begun(segments, expected(20, fault)))
        for drawn, segments in zip(found, schedules, strict=True)
    ]


def _begun(segments: list[Segment], run: Drawn) -> Drawn:
    """Return the part of a run that a schedule has played."""
    last = segments[-1]
    step, ahead = last.first + last.steps, last.played_at_save()
    return {
        (rank, at): numbers
        for (rank, at), numbers in run.items()
        if at < step or (at == step and (rank == "all" or rank in ahead))
    }


@pytest.mark.parametrize("group", GROUPS)
def test_every_logical_rank_draws_what_one_run_draws(group: int, tmp_path: Path) -> None:
    choices = random.Random(f"{SEED} {group}")
    sizes = [choices.choice(SIZES) for _ in range(choices.choice([2, 3, 3, 4]))]
    for drawn, run in played(tmp_path, sizes, f"{SEED} {group}"):
        assert drawn == run, f"FUZZ_SEED={SEED} FUZZ_FIRST={group}, sizes {sizes}"


FAULTS = {
    "rows exchanged": {1, 2},
    "a switch left out": {0, 1},
    "streams of the process": {"all", *range(8)},
}
"""By fault, the ranks that then draw other numbers."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, tmp_path: Path) -> None:
    for drawn, run in played(tmp_path, [1], "with a fault", fault):
        assert drawn.keys() == run.keys()
        assert {rank for rank, step in run if drawn[rank, step] != run[rank, step]} == FAULTS[fault]
