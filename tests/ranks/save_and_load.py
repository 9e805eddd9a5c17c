"""Checks of save and load in one job; every check runs on every rank of a real group."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.stateful import Stateful

from nemo_rng_dcp import RNGStateError, StatefulRNG, init_all_rng
from ranks.harness import gather, run
from scripts.demo.rankless import RanklessRNG
from streams import draw, unmoved


def draw_unevenly() -> None:
    draw(dist.get_rank() % 3)
    if dist.get_rank() % 2:
        torch.rand(dist.get_rank())


def streams_after_load(rng: Stateful, path: Path) -> tuple[list[float], list[float]]:
    """Save, draw, load, draw again: what was drawn after the save and after the load."""
    draw_unevenly()
    dcp.save({"rng": rng}, checkpoint_id=path)
    expected = draw(3)
    draw_unevenly()
    dcp.load({"rng": rng}, checkpoint_id=path)
    return expected, draw(3)


def check_every_rank_regains_its_own_stream(path: Path) -> None:
    expected, found = streams_after_load(StatefulRNG(42, ranked=True), path)
    assert found == expected
    all_numbers = [number for numbers in gather(found) for number in numbers]
    assert len(set(all_numbers)) == len(all_numbers), "ranks share a stream"


def check_the_rank_less_dict_loses_the_streams(path: Path) -> None:
    """The control: the same test fails for what most code does, so it can tell the two apart."""
    expected, found = streams_after_load(RanklessRNG(42, ranked=True), path)
    assert len({tuple(numbers) for numbers in gather(found)}) == 1, "not in lock-step"
    lost = [found_ != expected_ for expected_, found_ in gather((expected, found))]
    # One rank may have won all three fields; with two ranks or more some rank has lost its own.
    assert any(lost) == (dist.get_world_size() > 1)


def check_unranked_streams_are_alike_and_come_back(path: Path) -> None:
    rng = StatefulRNG(42)
    dcp.save({"rng": rng}, checkpoint_id=path)
    expected = draw()
    dcp.load({"rng": rng}, checkpoint_id=path)
    assert draw() == expected
    assert len({tuple(numbers) for numbers in gather(expected)}) == 1


def check_the_seed_is_ranked_as_in_init_all_rng(path: Path) -> None:
    StatefulRNG(42, ranked=True)
    expected = draw()
    init_all_rng(42 + dist.get_rank())
    assert draw() == expected


def check_a_save_moves_no_stream(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    with unmoved():
        dcp.save({"rng": rng}, checkpoint_id=path)


def check_the_checkpoint_holds_one_row_per_rank_and_no_bytes(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    dcp.save({"rng": rng}, checkpoint_id=path)
    tables = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert {"rng.origin", "rng.python", "rng.numpy", "rng.torch"} <= set(tables)
    for table in tables.values():
        assert isinstance(table, dcp.TensorStorageMetadata)
        assert table.properties.dtype == torch.int64
        assert table.size[0] == dist.get_world_size()
        offsets = sorted(chunk.offsets[0] for chunk in table.chunks)
        assert offsets == list(range(dist.get_world_size()))


def check_row_number_is_rank_in_a_plain_torch_file(path: Path) -> None:
    """dcp_to_torch_save gives whole plain tensors, and load_state_dict takes them."""
    rng = StatefulRNG(42, ranked=True)
    draw_unevenly()
    dcp.save({"rng": rng}, checkpoint_id=path)
    own = rng.state_dict()["origin"]
    expected = draw()
    file = path.with_suffix(f".{dist.get_rank()}.pt")
    dcp_to_torch_save(path, file)
    tables = torch.load(file, weights_only=True)["rng"]
    assert tables["origin"][:, 2].tolist() == list(range(dist.get_world_size()))
    assert torch.equal(tables["origin"][dist.get_rank()], own.to_local()[0])
    rng.load_state_dict(tables)
    assert draw() == expected


def check_a_state_dict_survives_torch_save(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    file = path.with_suffix(f".{dist.get_rank()}.pt")
    torch.save(rng.state_dict(), file)
    expected = draw()
    rng.load_state_dict(torch.load(file, weights_only=True))
    assert draw() == expected


class Drawing:
    """Another entry of the checkpoint, which draws whenever it is asked."""

    def state_dict(self) -> dict[str, Any]:
        draw()
        return {"nothing": torch.zeros(1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        draw()


def check_an_entry_that_draws_before_this_one_is_harmless(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    state = {"a": Drawing(), "rng": rng}
    dcp.save(state, checkpoint_id=path)
    expected = draw()
    dcp.load(state, checkpoint_id=path)
    assert draw() == expected


def check_rewind_undoes_an_entry_that_draws_after_this_one(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    # dcp.save asks in the order of the dict, dcp.load restores in alphabetical order.
    state = {"z": Drawing(), "rng": rng}
    dcp.save(state, checkpoint_id=path)
    expected = draw()
    dcp.load(state, checkpoint_id=path)
    assert draw() != expected
    rng.rewind()
    assert draw() == expected


def check_a_stream_seeded_for_another_rank_is_not_stored(path: Path) -> None:
    """Without RANK and before init_process_group, every process takes itself for rank 0."""
    if dist.get_rank() == 0:
        assert seeded_as_rank_0.state_dict()
        return
    for use in (
        seeded_as_rank_0.state_dict,
        lambda: seeded_as_rank_0.load_state_dict({}),
    ):
        with unmoved(), pytest.raises(RuntimeError, match="after init_process_group"):
            use()


def check_rank_decided_before_the_process_group(path: Path) -> None:
    assert drawn_before_the_group == expected_before_the_group
    assert len({tuple(numbers) for numbers in gather(drawn_before_the_group)}) == (
        dist.get_world_size()
    )
    assert seeded_by_rank_variable.state_dict()["python"].shape[0] == dist.get_world_size()


def check_no_process_group_is_created(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    before = len(dist.distributed_c10d._world.pg_map)
    rng.load_state_dict(rng.state_dict())
    assert len(dist.distributed_c10d._world.pg_map) == before


def check_another_ranks_row_is_refused(path: Path) -> None:
    if dist.get_world_size() == 1:
        return
    rng = StatefulRNG(42, ranked=True)
    tables = rng.state_dict()
    rows = gather({name: table.to_local() for name, table in tables.items()})
    neighbour = rows[(dist.get_rank() + 1) % dist.get_world_size()]
    for name in tables:
        swapped = rng.state_dict()
        swapped[name].to_local().copy_(neighbour[name])
        with unmoved(), pytest.raises(RNGStateError, match=f"^{name}: "):
            rng.load_state_dict(swapped)


def before_the_process_group() -> None:
    global seeded_by_rank_variable, drawn_before_the_group, expected_before_the_group
    global seeded_as_rank_0
    rank = os.environ.pop("RANK")
    seeded_as_rank_0 = StatefulRNG(7, ranked=True)
    os.environ["RANK"] = rank
    seeded_by_rank_variable = StatefulRNG(7, ranked=True)
    drawn_before_the_group = draw()
    init_all_rng(7 + int(rank))
    expected_before_the_group = draw()
    if rank != "0":
        # As things stand its row would be row 0 of 1, which belongs to rank 0.
        unranked = StatefulRNG(7)
        with unmoved(), pytest.raises(RuntimeError, match="call init_process_group"):
            unranked.state_dict()


if __name__ == "__main__":
    before_the_process_group()
    run(dict(globals()))
