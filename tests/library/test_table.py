"""Rows on meshes of many shapes, seen by each rank in turn of a fake group."""

import gc
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.checkpoint import DefaultSavePlanner, default_planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from nemo_rng_dcp import RNGStateError, StatefulRNG
from nemo_rng_dcp.grids import Grid, warn_if_moved
from nemo_rng_dcp.keys import own_key
from nemo_rng_dcp.record import ROWS
from nemo_rng_dcp.table import Rows, Wanted, reads_of_rows
from tests.support.jobs import job
from tests.support.records import record_of, records
from tests.support.streams import unmoved, warned

FakeGroup = Callable[[int, int], None]


def rows_of(
    fake_group: FakeGroup, shape: tuple[int, ...], names: tuple[str, ...], along: Any
) -> list[int]:
    """Each rank's row, in the order of the ranks."""
    world_size = torch.Size(shape).numel()
    rows = []
    for rank in range(world_size):
        fake_group(rank, world_size)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        part = mesh if along is None else mesh[along]
        here = Rows.current(part, Grid.of(part))
        table = here.table([torch.full((3,), rank)])
        assert isinstance(table, DTensor)
        assert (table.shape, table.stride()) == ((3 * here.count,), (1,))
        assert table.to_local().tolist() == [rank] * 3
        [chunk] = table.__create_chunk_list__()  # type: ignore[attr-defined]
        assert (chunk.offsets, chunk.sizes) == ((3 * here.row,), (3,))
        rows.append(here.row)
    return rows


@pytest.mark.parametrize(
    ("shape", "names", "along", "rows"),
    [
        ((2, 2), ("dp", "tp"), "dp", [0, 0, 1, 1]),
        ((2, 2), ("dp", "tp"), "tp", [0, 1, 0, 1]),
        ((2, 3), ("replicate", "shard"), None, [0, 1, 2, 3, 4, 5]),
        ((2, 3), ("replicate", "shard"), "shard", [0, 1, 2, 0, 1, 2]),
        ((2, 2, 2), ("pp", "dp", "tp"), "dp", [0, 0, 1, 1, 0, 0, 1, 1]),
        ((2, 2, 2), ("pp", "dp", "tp"), ("pp", "dp"), [0, 0, 1, 1, 2, 2, 3, 3]),
        ((2, 2, 2), ("pp", "dp", "tp"), None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((2, 1, 3), ("pp", "dp", "tp"), ("dp", "tp"), [0, 1, 2, 0, 1, 2]),
    ],
)
def test_a_row_per_coordinate_numbered_row_major(
    shape: tuple[int, ...],
    names: tuple[str, ...],
    along: Any,
    rows: list[int],
    fake_group: FakeGroup,
) -> None:
    assert rows_of(fake_group, shape, names, along) == rows


def test_a_rank_outside_the_mesh_has_no_row(fake_group: FakeGroup) -> None:
    fake_group(3, 4)
    mesh = DeviceMesh("cpu", [0, 1])
    with pytest.raises(ValueError, match="rank 3 is not in the mesh"):
        StatefulRNG(1, mesh=mesh)


def test_the_names_and_sizes_of_a_mesh_are_stored(fake_group: FakeGroup) -> None:
    fake_group(1, 8)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
    for along, expected in {
        "dp": (("dp", 2),),
        ("pp", "tp"): (("pp", 2), ("tp", 2)),
    }.items():
        rng = StatefulRNG(1, mesh=mesh[along])
        assert record_of(rng.state_dict()).mesh == expected
    unnamed = StatefulRNG(1, mesh=DeviceMesh("cpu", [[0, 1, 2, 3], [4, 5, 6, 7]]))
    assert record_of(unnamed.state_dict()).mesh == (("0", 2), ("1", 4))


def test_the_key_has_the_lowest_rank_of_a_grid_without_rank_0(
    fake_group: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_group(5, 8)
    first = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    second = DeviceMesh("cpu", [[4, 5], [6, 7]], mesh_dim_names=("dp", "tp"))
    part = second["dp"]
    keys = {"rng_streams": [None, first, first["dp"], first["tp"]]}
    keys["rng_streams@4"] = [second, second["dp"], second["tp"]]
    for key, meshes in keys.items():
        assert [list(StatefulRNG(1, mesh=mesh).state_dict()) for mesh in meshes] == [[key]] * len(
            meshes
        )
    grid = Grid.of(part)
    assert grid == Grid(5, 4, 7, None, part)
    monkeypatch.delattr(DeviceMesh, "_get_root_mesh", raising=False)
    whole = SimpleNamespace(get_root_mesh={part: second}.get)  # as in torch 2.9
    monkeypatch.setattr(device_mesh, "_mesh_resources", whole, raising=False)
    assert Grid.of(part) == grid
    # A torch that does not tell of which mesh another one is a part.
    monkeypatch.delattr(device_mesh, "_mesh_resources")
    assert Grid.of(part) == Grid(5, 0, 7, None, part)


def test_the_record_of_rank_0s_grid_is_no_other_grids(fake_group: FakeGroup) -> None:
    fake_group(5, 8)
    mesh = DeviceMesh("cpu", [4, 5], mesh_dim_names=("dp",))
    rng = StatefulRNG(1, mesh=mesh)
    [(key, table)] = rng.state_dict().items()
    assert warned(lambda: rng.load_state_dict({"rng_streams@7": table})) == []
    for others in ({"rng_streams": table}, {"rng_streams@6": table, "rng_streams@7": table}):
        with unmoved(), pytest.raises(RNGStateError, match=f"{key}: the state has no such entry"):
            rng.load_state_dict(others)


def test_what_is_saved_at_another_place_is_no_other_grids() -> None:
    key, elsewhere = "app.rng.rng_streams@4", ["app.rng_streams@7", "rng.rng_streams@7"]
    assert own_key(key, [*elsewhere, "app.rng.rng_streams@7"]) == "app.rng.rng_streams@7"
    for others in (elsewhere, ["app.rng.rng_streams"], ["app.rng.rng_streams@x"]):
        assert own_key(key, others) is None


def test_the_record_of_a_grid_that_moved_is_said_by_row_0_where_it_was_not_the_only_one() -> None:
    key, moved = "rng.rng_streams@1", "rng.rng_streams@2"
    [text] = warned(lambda: warn_if_moved(key, moved, 0, ["rng.rng_streams", moved]))
    assert f"no RNG state at {key}: that of the only grid without rank 0, at {moved}, is" in text
    for source, row, saved in [
        (moved, 0, [moved]),
        (moved, 1, ["rng.rng_streams", moved]),
        (key, 0, [key, moved]),
    ]:
        assert warned(lambda: warn_if_moved(key, source, row, saved)) == []  # noqa: B023


@pytest.mark.parametrize(("rank", "world_size"), [(0, 4), (1, 3)])
def test_a_mesh_of_other_ranks_than_there_are_is_refused(
    rank: int, world_size: int, fake_group: FakeGroup
) -> None:
    fake_group(1, 4)
    rng = StatefulRNG(1, mesh=init_device_mesh("cpu", (4,)))
    fake_group(rank, world_size)
    with unmoved(), pytest.raises(RuntimeError, match="Its rows are those of an earlier process"):
        rng.state_dict()


def test_the_record_of_another_row_is_refused(fake_group: FakeGroup) -> None:
    """The same shape, but rank 1 holds row 1 of the one and row 0 of the other."""
    fake_group(1, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    of_dp, of_tp = StatefulRNG(1, mesh=mesh["dp"]), StatefulRNG(1, mesh=mesh["tp"])
    message = (
        r'row 0 of 2 was given row 1 of 2.* give StatefulRNG the mesh .*: mesh=mesh\["dp"\]\.$'
    )
    with unmoved(), pytest.raises(RNGStateError, match=message):
        of_dp.load_state_dict(of_tp.state_dict())


def test_a_row_behind_a_record_that_is_altered_is_refused(fake_group: FakeGroup) -> None:
    """How many rows there are is what the first one says."""
    table = torch.cat([record.to_tensor() for record in records(2)])
    fake_group(1, 2)
    rows = Rows.current(None, None)
    assert rows.own_records(table)[1].row == 1
    table[ROWS] = 1
    with pytest.raises(RNGStateError, match="altered"):
        rows.own_records(table)


def test_without_a_group_gathering_gives_the_own_streams() -> None:
    rng = StatefulRNG(1)
    assert rng.fingerprint(gather=True) == [rng.fingerprint()]
    rng.verify_shared()


def plan_of(rank: int, world_size: int, fake_group: FakeGroup) -> SavePlan:
    fake_group(rank, world_size)
    planner = DefaultSavePlanner()
    planner.set_up_planner({"rng": StatefulRNG(1, ranked=True).state_dict()})
    return planner.create_local_plan()


def test_4096_ranks_have_the_same_key_and_one_write_item_each(fake_group: FakeGroup) -> None:
    lengths = set()
    for rank in (0, 1, 4095):
        [item] = plan_of(rank, 4096, fake_group).items
        assert item.index.fqn == "rng.rng_streams"
        assert item.tensor_data is not None
        [length] = item.tensor_data.chunk.sizes
        assert item.index.offset == (rank * length,)
        assert item.tensor_data.size == (4096 * length,)
        lengths.add(length)
    assert len(lengths) == 1


@pytest.mark.skipif(
    not hasattr(default_planner, "insort"), reason="this torch compares all pairs of chunks"
)
def test_dcp_plans_the_rows_in_linear_time(
    fake_group: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: how often DCP compares two chunks for overlap."""
    comparisons = 0

    def count(*_: object) -> bool:
        nonlocal comparisons
        comparisons += 1
        return False

    monkeypatch.setattr(default_planner, "_check_box_overlap", count)
    counted = {}
    for world_size in (16, 32, 1024, 2048):
        plan = plan_of(0, world_size, fake_group)
        plans = [plan]
        for rank in range(1, world_size):
            plans.append(_moved_to(plan, rank))
        comparisons = 0
        DefaultSavePlanner().create_global_plan(plans)
        counted[world_size] = comparisons
    assert all(count <= 8 * world_size for world_size, count in counted.items())


def _moved_to(plan: SavePlan, rank: int) -> SavePlan:
    """The plan of another rank: the same but for the row, as the test above shows."""
    from dataclasses import replace

    items = []
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        offsets = torch.Size((rank * data.chunk.sizes[0],))
        chunk = replace(data.chunk, offsets=offsets)
        items.append(
            replace(
                item,
                index=replace(item.index, offset=offsets),
                tensor_data=replace(data, chunk=chunk),
            )
        )
    return replace(plan, items=items)


def mesh_of_all_ranks(logical_ranks: int | None = None) -> DeviceMesh:
    rows = Rows.current(None, None, logical_ranks)
    table = rows.table([torch.full((3,), row) for row in rows.own])
    assert isinstance(table, DTensor)
    assert table.shape == (3 * rows.count,)
    [chunk] = table.__create_chunk_list__()  # type: ignore[attr-defined]
    assert (chunk.offsets, chunk.sizes) == ((3 * rows.row,), (3 * len(rows.own),))
    return table.device_mesh


def groups_one_after_the_other(folder: Path, has_registry: bool) -> list[list[object]]:
    """What became of the mesh and of the group, of groups of 4, 2, 1, 4 and 4 ranks."""
    from_group = DeviceMesh.from_group

    def of_another_torch(*arguments: Any, **options: Any) -> DeviceMesh:
        mesh = from_group(*arguments, **options)
        vars(mesh).pop("_pg_registry", None)
        return mesh

    if not has_registry:
        DeviceMesh.from_group = staticmethod(of_another_torch)  # type: ignore[method-assign]
    rank, found, earlier = int(os.environ["RANK"]), [], []
    for number, size in enumerate((4, 2, 1, 4, 4)):
        # The ranks in the opposite order: the same process is another rank in the next group.
        own = rank if number % 2 else 3 - rank
        if own < size:
            store = f"file://{folder}/{number}"
            dist.init_process_group("gloo", init_method=store, rank=own, world_size=size)
            mesh = mesh_of_all_ranks()
            kept = mesh is mesh_of_all_ranks() is mesh_of_all_ranks(logical_ranks=8)
            of_group = mesh.get_group() is dist.group.WORLD
            is_new = all(mesh is not other for other in earlier)
            group = weakref.ref(dist.group.WORLD)
            earlier.append(mesh)
            dist.barrier()
            dist.destroy_process_group()
            gc.collect()
            found.append([kept, of_group, is_new, group() is None])
    return found


@pytest.mark.parametrize("has_registry", [True, False])
def test_the_mesh_of_all_ranks_lives_as_long_as_their_group_and_does_not_hold_it(
    tmp_path: Path, has_registry: bool
) -> None:
    """Also on a torch whose meshes hold no groups by themselves."""
    found = job(4, groups_one_after_the_other, tmp_path, has_registry, group=False)
    assert [len(of_rank) for of_rank in found] == [4, 4, 3, 4]
    assert all(of_group == [True] * 4 for of_rank in found for of_group in of_rank)


def test_a_fork_that_becomes_another_rank_gets_a_mesh_of_its_own(fake_group: FakeGroup) -> None:
    fake_group(0, 2)
    before = mesh_of_all_ranks()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if mesh_of_all_ranks() is before:  # still the rank that it was
                fake_group(3, 4)
                code = 0 if mesh_of_all_ranks().size() == 4 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert mesh_of_all_ranks() is before


def test_threads_get_a_mesh_of_the_current_group_at_the_same_time(fake_group: FakeGroup) -> None:
    with ThreadPoolExecutor(8) as threads:
        for size in range(2, 40):
            fake_group(size - 1, size)
            meshes = list(threads.map(lambda _: mesh_of_all_ranks(), range(8)))
            assert {mesh.size() for mesh in meshes} == {size}
            assert mesh_of_all_ranks() in meshes


class Chunks(list[ChunkStorageMetadata]):
    """Counts how many of them were looked at."""

    looked_at = 0

    def __getitem__(self, number: Any) -> Any:
        self.looked_at += 1
        return super().__getitem__(number)

    def __iter__(self) -> Any:
        self.looked_at += len(self)
        return super().__iter__()


def test_rows_that_stand_together_in_a_chunk_are_one_read() -> None:
    """Six rows of 20 numbers, two in a chunk; rows 6 and 7 are new."""
    places = [torch.Size((number * 40,)) for number in range(3)]
    chunks = [ChunkStorageMetadata(place, torch.Size((40,))) for place in places]
    saved = TensorStorageMetadata(TensorProperties(torch.int64), torch.Size((120,)), chunks)
    reads = reads_of_rows("rng_streams", Wanted(range(1, 8), 20), saved)
    assert [read.storage_index.index for read in reads] == [0, 1, 2, 0]
    assert [read.storage_offsets[0] for read in reads] == [20, 0, 0, 0]
    assert [read.lengths[0] for read in reads] == [20, 40, 40, 40]
    assert [read.dest_offsets[0] for read in reads] == [0, 20, 60, 100]
    chunks.pop()
    with pytest.raises(RNGStateError, match="has no chunk of 40 numbers at 80, for row 4"):
        reads_of_rows("rng_streams", Wanted(range(1, 8), 20), saved)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_rows_chunk_is_looked_for_in_its_place_first(in_order: bool) -> None:
    """All chunks were gone through, as many as ranks, on every rank."""
    rows, length = 1000, 20
    places = [torch.Size((row * length,)) for row in range(rows)]
    stored = [ChunkStorageMetadata(place, torch.Size((length,))) for place in places]
    chunks = Chunks(stored if in_order else reversed(stored))
    size = torch.Size((rows * length,))
    saved = TensorStorageMetadata(TensorProperties(dtype=torch.int64), size, chunks)
    [read] = reads_of_rows("rng.rng_streams", Wanted(range(7, 8), length), saved)
    assert read.storage_index.offset == places[7]
    assert read.storage_index.index == (7 if in_order else rows - 8)
    assert (chunks.looked_at < 10) == in_order
