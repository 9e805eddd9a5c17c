"""Rows on meshes of many shapes, seen by each rank in turn of a fake group."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, default_planner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.layout import Layout, gather

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
        layout = Layout.current(mesh if along is None else mesh[along])
        table = layout.tables({"x": torch.full((3,), rank)})["x"]
        assert table.shape == (layout.rows, 3)
        assert layout.own_row(table).tolist() == [rank] * 3
        [chunk] = table.__create_chunk_list__()  # type: ignore[attr-defined]
        assert (chunk.offsets, chunk.sizes) == ((layout.row, 0), (1, 3))
        rows.append(layout.row)
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


def test_a_table_of_another_layout_is_refused(fake_group: FakeGroup) -> None:
    fake_group(1, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    of_all, of_dp, of_tp = (Layout.current(m) for m in (None, mesh["dp"], mesh["tp"]))
    rows = {"x": torch.arange(3)}
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(4, n\)"):
        of_all.own_row(of_dp.tables(rows)["x"])
    # The same shape, but rank 1 holds row 1 of the one and row 0 of the other.
    with pytest.raises(ValueError, match="does not place row 0 alone on rank 1"):
        of_dp.own_row(of_tp.tables(rows)["x"])


def test_without_a_group_gathering_gives_the_own_numbers() -> None:
    assert gather(torch.tensor([4, 5])).tolist() == [[4, 5]]
    StatefulRNG(1).verify_shared()


def plan_of(rank: int, world_size: int, fake_group: FakeGroup) -> SavePlan:
    fake_group(rank, world_size)
    planner = DefaultSavePlanner()
    planner.set_up_planner({"rng": StatefulRNG(1, ranked=True).state_dict()})
    return planner.create_local_plan()


def test_4096_ranks_have_the_same_keys_and_one_write_item_a_table(fake_group: FakeGroup) -> None:
    for rank in (0, 1, 4095):
        plan = plan_of(rank, 4096, fake_group)
        assert [item.index.fqn for item in plan.items] == [
            "rng.origin",
            "rng.python",
            "rng.numpy",
            "rng.torch",
        ]
        for item in plan.items:
            assert item.index.offset == (rank, 0)
            assert item.tensor_data is not None
            assert item.tensor_data.size[0] == 4096
            # DCP sweeps the longest dimension when it looks for overlaps: that must be the rows.
            assert item.tensor_data.size[1] < 640


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
    for world_size in (1024, 2048):
        plan = plan_of(0, world_size, fake_group)
        plans = [plan]
        for rank in range(1, world_size):
            plans.append(_moved_to(plan, rank))
        comparisons = 0
        DefaultSavePlanner().create_global_plan(plans)
        counted[world_size] = comparisons
    assert counted[2048] <= 2 * counted[1024] <= 8 * 1024


def _moved_to(plan: SavePlan, rank: int) -> SavePlan:
    """The plan of another rank: the same but for the row, as the test above shows."""
    from dataclasses import replace

    items = []
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        offsets = torch.Size((rank, 0))
        chunk = replace(data.chunk, offsets=offsets)
        items.append(
            replace(
                item,
                index=replace(item.index, offset=offsets),
                tensor_data=replace(data, chunk=chunk),
            )
        )
    return replace(plan, items=items)
