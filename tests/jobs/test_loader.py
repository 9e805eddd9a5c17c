"""ResumableLoader on several ranks: every resume is the uninterrupted run, on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler

from nemo_rng_dcp import ResumableLoader, RNGLoadPlanner, RNGStateError, StatefulRNG
from tests.support.jobs import job
from tests.support.loaders import ORDERS, Case, check_resumes, loader_of
from tests.support.streams import draw, warned

POINTS: list[Any] = [(0, 0), (0, 2), (0, "last"), (0, "end"), (1, 1)]


def resume(cases: list[Case], points: list[Any], folder: Path) -> None:
    for number, case in enumerate(cases):
        check_resumes(case, folder / str(number), points)


def test_every_rank_resumes_like_an_uninterrupted_run(tmp_path: Path) -> None:
    job(2, resume, [Case(order) for order in ORDERS], POINTS, tmp_path)


@pytest.mark.parametrize("orders", [("distributed", "loader's own"), ("stream", "lazy")])
def test_every_rank_resumes_with_workers(orders: tuple[str, ...], tmp_path: Path) -> None:
    job(2, resume, [Case(order, 2) for order in orders], [(0, 2)], tmp_path)


def orders_on_meshes() -> dict[str, list[int]]:
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rngs = {"every rank": StatefulRNG(1, ranked=True), "none": StatefulRNG(1)}
    rngs["dp"] = StatefulRNG(1, ranked=True, mesh=whole["dp"])
    orders = {}
    for name, rng in rngs.items():
        loader = ResumableLoader(DataLoader(range(40), 40, shuffle=True), rng)  # type: ignore[arg-type]
        orders[name] = next(iter(loader)).tolist()
    return orders


def test_ranks_that_share_a_row_have_the_same_batches() -> None:
    def alike(name: str) -> list[list[int]]:
        return [[n for n, other in enumerate(found) if other[name] == one[name]] for one in found]

    found = job(4, orders_on_meshes)
    assert alike("every rank") == [[0], [1], [2], [3]]
    assert alike("dp") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert alike("none") == [[0, 1, 2, 3]] * 4


def begin() -> tuple[ResumableLoader, dict[str, Any]]:
    sampler: DistributedSampler[int] = DistributedSampler(range(12))  # type: ignore[arg-type]
    rng = StatefulRNG(1, ranked=True)
    loader = ResumableLoader(DataLoader(range(12), sampler=sampler), rng)  # type: ignore[arg-type]
    return loader, {"rng": rng, "loader": loader}


def save(folder: Path, batches: int) -> None:
    """Save behind so many batches of the second epoch."""
    loader, state = begin()
    list(loader)
    for _, _ in zip(range(batches), loader, strict=False):
        pass
    dcp.save(state, checkpoint_id=folder)


def load(folder: Path) -> tuple[int, int, list[int]]:
    loader, state = begin()
    dcp.load(state, checkpoint_id=folder, planner=RNGLoadPlanner())
    return loader.epoch, loader.batches, [batch.item() for batch in loader]


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_begins_the_next_epoch(size: int, tmp_path: Path) -> None:
    job(2, save, tmp_path, 0)
    results = job(size, load, tmp_path)
    assert [result[:2] for result in results] == [(1, 0)] * size
    assert sorted(sample for *_, samples in results for sample in samples) == list(range(12))


def load_in_the_middle(folder: Path) -> None:
    loader, state = begin()
    with pytest.raises(RNGStateError, match="number of rows 2, and now it is"):
        dcp.load(state, checkpoint_id=folder, planner=RNGLoadPlanner())
    assert (loader.epoch, loader.batches) == (0, 0)


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_is_refused_in_the_middle(size: int, tmp_path: Path) -> None:
    job(2, save, tmp_path, 2)
    job(size, load_in_the_middle, tmp_path)


def load_without_the_other(folder: Path) -> None:
    _, state = begin()
    dcp.save({"rng": state["rng"]}, checkpoint_id=folder / "without")
    dcp.save(state, checkpoint_id=folder / "with")

    def load(state: dict[str, Any], name: str) -> list[str]:
        return warned(
            lambda: dcp.load(state, checkpoint_id=folder / name, planner=RNGLoadPlanner())
        )

    assert load(state, "with") == []
    (message,) = load(state, "without")
    assert "the checkpoint holds no loader_position for a ResumableLoader" in message
    ignored = load({"rng": state["rng"]}, "with")
    assert len(ignored) == (dist.get_rank() == 0)
    assert (
        "position of a loader at loader.loader_position" in (ignored or [message])[0]
        or ignored == []
    )


def test_a_loader_that_the_checkpoint_or_the_job_lacks_is_said(tmp_path: Path) -> None:
    job(2, load_without_the_other, tmp_path)


LOGICAL = 4


def train_logical(order: str, folder: Path, resumed: bool) -> dict[int, list[Any]]:
    """Train on logical ranks; return what each of this process's saw behind the checkpoint."""
    rng = StatefulRNG(1, ranked=True, logical_ranks=LOGICAL)
    loader = ResumableLoader({r: loader_of(order, 0, "sample", {}) for r in rng.ranks}, rng)
    state = {"rng": rng, "loader": loader}
    if resumed:
        dcp.load(state, checkpoint_id=folder)
        for rank in rng.ranks:
            with rng.as_rank(rank):
                draw()
    steps: dict[int, list[Any]] = {rank: [] for rank in rng.ranks}
    for epoch in loader.epochs(2):
        for batches in loader:
            for rank, batch in batches.items():
                with rng.as_rank(rank):
                    steps[rank].append((batch, draw()))
            if (epoch, loader.batches, resumed) == (0, 2, False):
                dcp.save(state, checkpoint_id=folder)
                steps = {rank: [] for rank in rng.ranks}
    return steps


@pytest.mark.parametrize("order", ["shuffle", "lazy", "sampler's own", "iterable"])
def test_logical_ranks_resume_on_another_number_of_processes(order: str, tmp_path: Path) -> None:
    def train(size: int, resumed: bool) -> dict[int, list[Any]]:
        found = job(size, train_logical, order, tmp_path, resumed)
        return {rank: steps for process in found for rank, steps in process.items()}

    expected = train(2, False)
    assert sorted(expected) == list(range(LOGICAL))
    assert len({str(steps) for steps in expected.values()}) == LOGICAL
    for size in (1, 2, 4):
        assert train(size, True) == expected, f"resumed on {size} processes"


def resume_on_grids(folder: Path) -> None:
    """Two halves of the job have meshes of their own, and are at different batches."""
    half = dist.get_rank() // 2
    # All ranks take part in making a mesh.
    mesh = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])][half]

    def begin() -> tuple[ResumableLoader, dict[str, Any]]:
        rng = StatefulRNG(half, ranked=True, mesh=mesh)
        loader = ResumableLoader(DataLoader(range(9), shuffle=True), rng)  # type: ignore[arg-type]
        return loader, {"rng": rng, "loader": loader}

    loader, state = begin()
    assert list(loader.state_dict()) == [f"loader_position{'@2' * half}"]
    batches = iter(loader)
    for _ in range(1 + half):
        next(batches)
    dcp.save(state, checkpoint_id=folder)
    expected = list(batches)
    loader, state = begin()
    dcp.load(state, checkpoint_id=folder)
    assert list(loader) == expected


def test_grids_of_ranks_keep_positions_of_their_own(tmp_path: Path) -> None:
    job(4, resume_on_grids, tmp_path)
