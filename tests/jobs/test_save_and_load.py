"""Save and load in one job, on real ranks."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nemo_rng_dcp import RNGStateError, ScopedRNG, StatefulRNG, init_all_rng
from nemo_rng_dcp.record import KEY, Record
from nemo_rng_dcp.table import records_in
from scripts.demo.rankless import RanklessRNG
from tests.support.jobs import begin_group, gather, job, process_groups
from tests.support.records import record_of
from tests.support.streams import draw, unmoved

Numbers = list[float]

sizes = pytest.mark.parametrize("size", [1, 2, 4])


def assert_distinct(streams: list[Numbers]) -> None:
    numbers = [number for stream in streams for number in stream]
    assert len(set(numbers)) == len(numbers), "ranks share a stream"


def draw_unevenly() -> None:
    draw(dist.get_rank() % 3)
    if dist.get_rank() % 2:
        torch.rand(dist.get_rank())


def around_a_load(create: Callable[..., Stateful], path: Path) -> tuple[Numbers, Numbers]:
    """Save, draw, load, draw again: what was drawn after the save and after the load."""
    rng = create(42, ranked=True)
    draw_unevenly()
    dcp.save({"rng": rng}, checkpoint_id=path)
    expected = draw(3)
    draw_unevenly()
    dcp.load({"rng": rng}, checkpoint_id=path)
    return expected, draw(3)


@sizes
def test_every_rank_regains_its_own_stream(size: int, tmp_path: Path) -> None:
    numbers = job(size, around_a_load, StatefulRNG, tmp_path)
    for expected, found in numbers:
        assert found == expected
    assert_distinct([found for _, found in numbers])


@sizes
def test_the_rank_less_dict_loses_the_streams(size: int, tmp_path: Path) -> None:
    """The control: the same test fails for what most code does, so it can tell the two apart."""
    numbers = job(size, around_a_load, RanklessRNG, tmp_path)
    assert len({tuple(found) for _, found in numbers}) == 1, "not in lock-step"
    # One rank may have won all three fields; with two ranks or more some rank has lost its own.
    assert any(found != expected for expected, found in numbers) == (size > 1)


def around_an_unranked_load(path: Path) -> tuple[Numbers, Numbers]:
    rng = StatefulRNG(42)
    dcp.save({"rng": rng}, checkpoint_id=path)
    expected = draw()
    dcp.load({"rng": rng}, checkpoint_id=path)
    return expected, draw()


@sizes
def test_unranked_streams_are_alike_and_come_back(size: int, tmp_path: Path) -> None:
    numbers = job(size, around_an_unranked_load, tmp_path)
    expected, _ = numbers[0]
    assert numbers == [(expected, expected)] * size


def seed_in_two_ways() -> tuple[Numbers, Numbers]:
    StatefulRNG(42, ranked=True)
    found = draw()
    init_all_rng(42 + dist.get_rank())
    return found, draw()


@sizes
def test_the_seed_is_ranked_as_in_init_all_rng(size: int) -> None:
    for found, expected in job(size, seed_in_two_ways):
        assert found == expected


def save_unmoved(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    with unmoved():
        dcp.save({"rng": rng}, checkpoint_id=path)


@sizes
def test_a_save_moves_no_stream(size: int, tmp_path: Path) -> None:
    job(size, save_unmoved, tmp_path)


@sizes
def test_the_checkpoint_holds_one_row_per_rank_and_no_bytes(size: int, tmp_path: Path) -> None:
    job(size, save_unmoved, tmp_path)
    stored = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert list(stored) == ["rng.rng_streams"]
    table = stored["rng.rng_streams"]
    assert isinstance(table, dcp.TensorStorageMetadata)
    assert table.properties.dtype == torch.int64
    [length] = {chunk.sizes[0] for chunk in table.chunks}
    assert table.size == (size * length,)
    offsets = sorted(chunk.offsets[0] for chunk in table.chunks)
    assert offsets == [rank * length for rank in range(size)]


def load_from_a_torch_file(path: Path) -> tuple[Numbers, Numbers]:
    """dcp_to_torch_save gives whole plain tensors, and load_state_dict takes them."""
    rng = StatefulRNG(42, ranked=True)
    draw_unevenly()
    dcp.save({"rng": rng}, checkpoint_id=path)
    own = record_of(rng.state_dict())
    expected = draw()
    file = path / f"{dist.get_rank()}.pt"
    dcp_to_torch_save(path, file)
    state = torch.load(file, weights_only=True)["rng"]
    records = [Record.from_tensor(row) for row in records_in(state[KEY])]
    assert [record.row for record in records] == list(range(dist.get_world_size()))
    assert records[dist.get_rank()].streams == own.streams
    rng.load_state_dict(state)
    return expected, draw()


@sizes
def test_row_number_is_rank_in_a_plain_torch_file(size: int, tmp_path: Path) -> None:
    for expected, found in job(size, load_from_a_torch_file, tmp_path):
        assert found == expected


def around_torch_save(path: Path) -> tuple[Numbers, Numbers]:
    rng = StatefulRNG(42, ranked=True)
    file = path / f"{dist.get_rank()}.pt"
    torch.save(rng.state_dict(), file)
    expected = draw()
    rng.load_state_dict(torch.load(file, weights_only=True))
    return expected, draw()


@sizes
def test_a_state_dict_survives_torch_save(size: int, tmp_path: Path) -> None:
    for expected, found in job(size, around_torch_save, tmp_path):
        assert found == expected


class Drawing:
    """Another entry of the checkpoint, which draws whenever it is asked."""

    def state_dict(self) -> dict[str, Any]:
        draw()
        return {"nothing": torch.zeros(1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        draw()


def beside_an_entry_that_draws(key: str, path: Path) -> tuple[Numbers, Numbers, Numbers]:
    """What is drawn after the save, after the load and after a rewind."""
    rng = StatefulRNG(42, ranked=True)
    # dcp.save asks in the order of the dict, dcp.load restores in alphabetical order.
    state = {key: Drawing(), "rng": rng}
    dcp.save(state, checkpoint_id=path)
    saved = draw()
    dcp.load(state, checkpoint_id=path)
    loaded = draw()
    rng.rewind()
    return saved, loaded, draw()


@sizes
def test_an_entry_that_draws_before_this_one_is_harmless(size: int, tmp_path: Path) -> None:
    for saved, loaded, _ in job(size, beside_an_entry_that_draws, "a", tmp_path):
        assert loaded == saved


@sizes
def test_rewind_undoes_an_entry_that_draws_after_this_one(size: int, tmp_path: Path) -> None:
    for saved, loaded, rewound in job(size, beside_an_entry_that_draws, "z", tmp_path):
        assert loaded != saved
        assert rewound == saved


def seed_without_rank_or_group() -> None:
    """Without RANK and before init_process_group, every process takes itself for rank 0."""
    rank = os.environ.pop("RANK")
    rng = StatefulRNG(7, ranked=True)
    os.environ["RANK"] = rank
    begin_group()
    if rank == "0":
        assert rng.state_dict()
        return
    for use in (rng.state_dict, lambda: rng.load_state_dict({})):
        with unmoved(), pytest.raises(RuntimeError, match="after init_process_group"):
            use()


@sizes
def test_a_stream_seeded_for_another_rank_is_not_stored(size: int) -> None:
    job(size, seed_without_rank_or_group, group=False)


def seed_before_the_group() -> tuple[Numbers, Numbers, int]:
    rank = int(os.environ["RANK"])
    rng = StatefulRNG(7, ranked=True)
    found = draw()
    init_all_rng(7 + rank)
    expected = draw()
    begin_group()
    return found, expected, record_of(rng.state_dict()).rows


@sizes
def test_rank_decided_before_the_process_group(size: int) -> None:
    results = job(size, seed_before_the_group, group=False)
    for found, expected, rows in results:
        assert (found, rows) == (expected, size)
    assert_distinct([found for found, _, _ in results])


def state_without_a_group() -> None:
    """As things stand the row would be row 0 of 1, which belongs to rank 0."""
    rng = StatefulRNG(7)
    if os.environ["RANK"] == "0":
        assert rng.state_dict()
        return
    with unmoved(), pytest.raises(RuntimeError, match="call init_process_group"):
        rng.state_dict()


def test_another_rank_than_0_has_no_state_before_the_process_group() -> None:
    job(2, state_without_a_group, group=False)


def count_groups() -> tuple[int, int]:
    rng = StatefulRNG(42, ranked=True)
    before = process_groups()
    rng.load_state_dict(rng.state_dict())
    return before, process_groups()


@sizes
def test_no_process_group_is_created(size: int) -> None:
    for before, after in job(size, count_groups):
        assert after == before


def load_the_neighbours_rows() -> None:
    rng = StatefulRNG(42, ranked=True)
    state = rng.state_dict()
    rank, size = dist.get_rank(), dist.get_world_size()
    neighbour = (rank + 1) % size
    state[KEY].to_local().copy_(gather(state[KEY].to_local())[neighbour])  # type: ignore[attr-defined]
    message = f"row {rank} of {size} was given row {neighbour} of {size}"
    with unmoved(), pytest.raises(RNGStateError, match=message):
        rng.load_state_dict(state)


@pytest.mark.parametrize("size", [2, 4])
def test_another_ranks_row_is_refused(size: int) -> None:
    job(size, load_the_neighbours_rows)


class App:
    """A checkpoint's one object, with the streams inside what it returns."""

    def __init__(self, rng: StatefulRNG) -> None:
        self.rng = rng

    def state_dict(self) -> dict[str, Any]:
        return {"weight": torch.ones(3), "rng": self.rng.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.load_state_dict(state["rng"])


def inside_an_object(rng: StatefulRNG, path: Path) -> tuple[Numbers, Numbers]:
    dcp.save({"app": App(rng)}, checkpoint_id=path)
    expected = draw()
    dcp.load({"app": App(rng)}, checkpoint_id=path)
    return expected, draw()


def as_tensors(rng: StatefulRNG, path: Path) -> tuple[Numbers, Numbers]:
    dcp.save({"rng": rng.state_dict()}, checkpoint_id=path)
    expected = draw()
    state = {"rng": rng.state_dict()}
    dcp.load(state, checkpoint_id=path)
    rng.load_state_dict(state["rng"])
    return expected, draw()


def places_in_a_checkpoint(path: Path) -> list[tuple[Numbers, Numbers]]:
    """What docs/frameworks/plain.md lists: what was drawn after the save and after the load."""
    rng = StatefulRNG(42, ranked=True)
    return [inside_an_object(rng, path / "object"), as_tensors(rng, path / "tensors")]


def test_streams_come_back_from_every_place_in_a_checkpoint(tmp_path: Path) -> None:
    for places in job(2, places_in_a_checkpoint, tmp_path):
        for expected, found in places:
            assert found == expected


def test_below_the_top_level_the_object_itself_is_refused(tmp_path: Path) -> None:
    state = {"app": {"rng": StatefulRNG(42)}}
    with pytest.raises(CheckpointException, match="top level of its dict alone"):
        dcp.save(state, checkpoint_id=tmp_path)


def shards_initialised_after_sharding(scope: bool) -> list[float]:
    StatefulRNG(42, ranked=True)
    model = torch.nn.Linear(8, 8, device="meta")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    with ScopedRNG(7) if scope else nullcontext():
        model.reset_parameters()
    return model.weight.to_local().flatten().tolist()  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("scope", [True, False])
def test_on_the_cpu_a_scope_gives_all_shards_the_same_weights(scope: bool) -> None:
    first, second = job(2, shards_initialised_after_sharding, scope)
    assert len(first) == 32
    assert (first == second) == scope
