"""ResumableLoader on several ranks: every resume is the uninterrupted run, on every rank."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import job
from tests.support.loaders import ORDERS, Case, check_resumes

POINTS: list[Any] = [(0, 0), (0, 2), (0, "last"), (0, "end"), (1, 1)]


def resume(cases: list[Case], points: list[Any], folder: Path) -> None:
    for number, case in enumerate(cases):
        check_resumes(case, folder / str(number), points)


def test_every_rank_resumes_like_an_uninterrupted_run(tmp_path: Path) -> None:
    job(2, resume, [Case(order) for order in ORDERS], POINTS, tmp_path)


@pytest.mark.parametrize("orders", [("distributed", "loader's own"), ("stream", "lazy")])
def test_every_rank_resumes_with_workers(orders: tuple[str, ...], tmp_path: Path) -> None:
    job(2, resume, [Case(order, 2) for order in orders], [(0, 2)], tmp_path)
