"""ResumableLoader in one process: every resume is the uninterrupted run."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.loaders import ORDERS, Case, Run


def resumes_like_an_uninterrupted_run(case: Case, folder: Path) -> None:
    points: list[Any] = [(0, 1), (0, 2), (0, "end"), (1, 2), (1, "end")]
    run = Run(case)
    run.save(folder / "start")
    saves = {point: folder / f"{point[0]}-{point[1]}" for point in points}
    run.train(saves)
    last = max(batch for epoch, batch, *_ in run.steps if epoch == 0)
    assert Run(case).train().steps == run.steps, "saves have moved something"
    for point in ["start", *points]:
        path = folder / "start" if point == "start" else saves[point]
        again = Run(case, seed=1000).load(path).train()
        epoch, batch = (-1, 0) if point == "start" else point
        done = [s for s in run.steps if s[0] < epoch or (s[0] == epoch and (batch == "end" or s[1] <= batch))]
        assert again.steps == run.steps[len(done) :], f"resumed at {point}, of {last}"
        assert again.rng.fingerprint() == run.rng.fingerprint()


@pytest.mark.parametrize("order", ORDERS)
def test_a_resume_is_the_uninterrupted_run(order: str, tmp_path: Path) -> None:
    resumes_like_an_uninterrupted_run(Case(order), tmp_path)

@pytest.mark.parametrize("order", ORDERS)
def test_a_resume_is_the_uninterrupted_run2(order: str, tmp_path: Path) -> None:
    resumes_like_an_uninterrupted_run(Case(order,2), tmp_path)
