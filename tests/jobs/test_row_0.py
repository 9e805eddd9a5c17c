"""Which ranks say that generators are not those of the checkpoint."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from tests.support.jobs import job
from tests.support.streams import warned


class WithData(DefaultLoadPlanner):
    """A planner with data of its own in its plans."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return LoadPlan(plan.items, plan.storage_data, f"of rank {dist.get_rank()}")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert [plan.planner_data for plan in global_plan] == ["of rank 0", "of rank 1"]
        return super().create_global_plan(global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        assert central_plan.planner_data == f"of rank {dist.get_rank()}"
        return super().finish_plan(central_plan)


def of(names: list[list[str]]) -> StatefulRNG:
    """Each rank's, with generators of its own."""
    own = {name: random.Random(name) for name in names[dist.get_rank()]}
    return StatefulRNG(1, ranked=True, generators=own)


def save(path: Path, names: list[list[str]]) -> None:
    dcp.save({"rng": of(names), "w": torch.ones(1)}, checkpoint_id=path)


def load(path: Path, names: list[list[str]], how: str) -> list[str]:
    rng, state = of(names), {"w": torch.zeros(1)}
    planner: dict[str, Any] = {
        "plain": DefaultLoadPlanner,
        "planner": RNGLoadPlanner,
        "wrapped": lambda: RNGLoadPlanner(WithData()),
    }
    if how == "alone":
        return warned(lambda: rng.load(path))
    return warned(
        lambda: dcp.load({"rng": rng, **state}, checkpoint_id=path, planner=planner[how]())
    )


@pytest.mark.parametrize("how", ["planner", "wrapped", "alone"])
@pytest.mark.parametrize("names", [["aug", "new"], []])
def test_a_job_that_changed_says_so_once(tmp_path: Path, how: str, names: list[str]) -> None:
    job(2, save, tmp_path, [["aug"], ["aug"]])
    first, second = job(2, load, tmp_path, [names, names], how)
    assert len(first) == 1
    assert second == []


@pytest.mark.parametrize("how", ["plain", "planner", "alone"])
def test_a_rank_that_alone_has_other_generators_says_so(tmp_path: Path, how: str) -> None:
    job(2, save, tmp_path, [["aug"], ["aug"]])
    first, [text] = job(2, load, tmp_path, [["aug"], ["bug"]], how)
    assert first == []
    assert text.startswith("RNG state, row 1: the checkpoint has no bug")
    assert "the checkpoint has aug, which this job does not have: ignored" in text


@pytest.mark.parametrize("how", ["planner", "alone"])
def test_a_rank_that_alone_has_fewer_says_so(tmp_path: Path, how: str) -> None:
    job(2, save, tmp_path, [["aug", "own"], ["aug", "own"]])
    [first], [text] = job(2, load, tmp_path, [["aug", "own", "new"], ["aug"]], how)
    assert "the checkpoint has no new" in first
    assert "the checkpoint has own, which this job does not have" in text


@pytest.mark.parametrize("how", ["plain", "planner", "alone"])
def test_a_rank_that_alone_had_other_generators_says_so(tmp_path: Path, how: str) -> None:
    job(2, save, tmp_path, [["aug"], ["bug"]])
    first, [text] = job(2, load, tmp_path, [["aug"], ["aug"]], how)
    assert first == []
    assert text.startswith("RNG state, row 1: the checkpoint has no aug")
