"""Grids of ranks in one job, each on a mesh of its own; and meshes of an earlier process group."""

import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, StatefulRNG
from nemo_rng_dcp.cli.reading.opening import open_tables
from tests.support.jobs import job
from tests.support.streams import draw, unmoved, warned

Numbers = list[float]


def on_grids(*grids: list[int], **options: Any) -> StatefulRNG:
    """This rank's, on the grid that has it; each grid has a seed of its own."""
    meshes = [DeviceMesh("cpu", ranks, mesh_dim_names=("dp",)) for ranks in grids]
    for number, (ranks, mesh) in enumerate(zip(grids, meshes, strict=True)):
        if dist.get_rank() in ranks:
            return StatefulRNG(100 * number, ranked=True, mesh=mesh, **options)
    raise AssertionError("no grid has this rank")


def save_on_two(path: Path) -> Numbers:
    rng = on_grids([0, 1], [2, 3])
    draw(dist.get_rank() + 1)
    with unmoved():
        dcp.save({"rng": rng}, checkpoint_id=path / "dcp")
        rng.save(path / "alone")
    return draw()


def by_dcp(path: Path, rng: StatefulRNG, planner: LoadPlanner) -> None:
    dcp.load({"rng": rng}, checkpoint_id=path / "dcp", planner=planner)


def load_on_grids(path: Path, grids: list[list[int]], how: str) -> tuple[Numbers, list[str]]:
    rng = on_grids(*grids)
    draw(9)
    load: dict[str, Callable[[], object]] = {
        "plain": lambda: by_dcp(path, rng, DefaultLoadPlanner()),
        "planner": lambda: by_dcp(path, rng, RNGLoadPlanner()),
        "alone": lambda: rng.load(path / "alone"),
        "key": lambda: rng.load(path / "dcp", key="rng"),
        "chosen": lambda: rng.load(path / "dcp", key="rng@2" if dist.get_rank() else "rng"),
    }
    if how == "chosen":
        rng.load(path / "dcp", key="rng@2")
        of_second = rng.fingerprint()
    texts = warned(load[how])
    if how == "chosen":
        assert (rng.fingerprint() == of_second) == (dist.get_rank() > 0)
    return draw(), texts


@pytest.mark.parametrize("how", ["plain", "planner", "alone", "key"])
def test_each_of_two_grids_gets_its_own_streams_back(tmp_path: Path, how: str) -> None:
    saved = job(4, save_on_two, tmp_path)
    loaded = job(4, load_on_grids, tmp_path, [[0, 1], [2, 3]], how)
    assert loaded == [(numbers, []) for numbers in saved]
    paths = [table.key for table in open_tables(str(tmp_path / "dcp"))]
    assert paths == ["rng", "rng@2"], "the command finds both"


@pytest.mark.parametrize("how", ["planner", "alone", "chosen"])
def test_a_grid_whose_ranks_moved_continues_and_says_so(tmp_path: Path, how: str) -> None:
    """Unless its record was chosen."""
    saved = job(4, save_on_two, tmp_path)
    first, (numbers, texts), second = job(3, load_on_grids, tmp_path, [[0], [1, 2]], how)
    assert first[0] == saved[0]
    assert (numbers, second) == (saved[2], (saved[3], []))
    if how == "chosen":
        assert texts == []
        return
    place = "rng." if how == "planner" else ""
    [text] = texts
    assert f"no RNG state at {place}rng_streams@1" in text
    assert f"at {place}rng_streams@2, is loaded" in text


def save_on_second_only(path: Path) -> None:
    rng = on_grids([0, 1], [2, 3])
    dcp.save({"rng": rng} if dist.get_rank() > 1 else {}, checkpoint_id=path)


def load_on_both(path: Path) -> tuple[str, str]:
    rng = on_grids([0, 1], [2, 3])
    with unmoved(), pytest.raises(RNGStateError) as alone:
        rng.load(path)
    moved = on_grids([0, 2], [1, 3])
    with unmoved(), pytest.raises(CheckpointException) as caught:
        dcp.load({"rng": moved}, checkpoint_id=path, planner=RNGLoadPlanner())
    return str(alone.value), str(caught.value)


def test_one_record_is_not_loaded_by_two_grids(tmp_path: Path) -> None:
    job(4, save_on_second_only, tmp_path)
    for texts in job(4, load_on_both, tmp_path):
        assert all("two grids of ranks would load this record" in text for text in texts)
        assert all("by itself, with StatefulRNG.load(key=)" in text for text in texts)


def load_by_parts(path: Path) -> list[str]:
    """Each grid loads by itself, and has no part in what the other reads."""
    rng = on_grids([0, 1], [2, 3])
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    texts = warned(
        lambda: dcp.load(
            {"rng": rng},
            checkpoint_id=path / "dcp",
            planner=RNGLoadPlanner(),
            process_group=groups[dist.get_rank() // 2],
        )
    )
    assert texts == []
    state: dict[str, Any] = {} if dist.get_rank() > 1 else {"rng": rng}
    planner = RNGLoadPlanner()
    return warned(lambda: dcp.load(state, checkpoint_id=path / "dcp", planner=planner))


def test_what_no_rank_reads_is_named_and_what_others_may_read_is_not(tmp_path: Path) -> None:
    job(4, save_on_two, tmp_path)
    first, *others = job(4, load_by_parts, tmp_path)
    [text] = first
    assert "the checkpoint has RNG state at rng.rng_streams@2, for which this job has no" in text
    assert others == [[]] * 3


# What ranks say of one another.


def verify_on_two_grids() -> tuple[list[dict[str, str]], dict[str, str], str]:
    own = {"actor" if dist.get_rank() < 2 else "critic": random.Random(7)}
    rng = on_grids([0, 1], [2, 3], shared_generators=own)
    rng.verify_shared()
    rows = rng.fingerprint(gather=True)
    if dist.get_rank() == 3:
        next(iter(own.values())).random()
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    return rows, rng.fingerprint(), str(caught.value).split(". ")[0]


def test_ranks_are_compared_within_their_grid() -> None:
    answers = job(4, verify_on_two_grids)
    for rank, (rows, _, text) in enumerate(answers):
        first = rank // 2 * 2
        assert [row["python"] for row in rows] == [
            answers[other][1]["python"] for other in (first, first + 1)
        ]
        assert text == "critic: ranks 2, 3 share it, but rank 3 differs from rank 2"


# A mesh that is older than its process group.


def load_after_regroup(path: Path) -> list[str]:
    size = dist.get_world_size()
    rng = StatefulRNG(3, ranked=True, mesh=init_device_mesh("cpu", (size,)))
    mesh = init_device_mesh("cpu", (size,))
    dcp.save({"rng": rng}, checkpoint_id=path / "saved")
    dist.barrier()
    new = (dist.get_rank() + 1) % size
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=new,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    texts = []
    for call in (
        rng.state_dict,
        lambda: by_dcp(path, rng, RNGLoadPlanner()),
        lambda: rng.save(path / "alone"),
        lambda: rng.load(path / "saved"),
        rng.verify_shared,
        lambda: rng.fingerprint(gather=True),
        lambda: StatefulRNG(3, mesh=mesh),
    ):
        with unmoved(), pytest.raises(RuntimeError) as caught:
            call()  # type: ignore[operator]
        texts.append(str(caught.value))
    return texts


def test_a_mesh_of_an_earlier_process_group_is_refused(tmp_path: Path) -> None:
    for texts in job(3, load_after_regroup, tmp_path):
        assert len(texts) == 7
        for text in texts:
            assert "Its rows are those of an earlier process group: make the mesh" in text


# Flattened meshes.


def use_flattened(path: Path, shape: tuple[int, int], save: bool) -> list[str]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "cp"))
    rng = StatefulRNG(1, ranked=True, mesh=mesh["dp", "cp"]._flatten("dp_cp"))
    if save:
        dcp.save({"rng": rng}, checkpoint_id=path)
        return []
    return warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner()))


@pytest.mark.parametrize(
    ("then", "now", "renumbered"),
    [((4, 1), (4, 1), ""), ((4, 1), (2, 2), "along dp 4 and are loaded along dp 2 x cp 2")],
)
def test_what_a_flattened_mesh_is_made_of_is_compared(
    tmp_path: Path, then: tuple[int, int], now: tuple[int, int], renumbered: str
) -> None:
    job(4, use_flattened, tmp_path, then, True)
    first, *others = job(4, use_flattened, tmp_path, now, False)
    assert len(first) == bool(renumbered)
    assert all(renumbered in text for text in first)
    assert others == [[]] * 3
