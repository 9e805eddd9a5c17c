"""What DCP's planning costs at scale, in one process and without ranks.

Rank 0's plan is made through the real API, in a fake process group of that size. The plans of the
other ranks differ from it in the offset of every chunk only, so they are derived from it, and some
of them are compared with what the real API gives a process that has that rank.
"""

from __future__ import annotations

import gc
import pickle
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target, cpu_seconds, growth
from scripts.bench.ways import rank_named, sharded_tensor

ROUNDS = 5
ITEM_BYTES = 13_000
"""About as much as a record takes in a rank's file."""

Planners = Mapping[str, Callable[[], LoadPlanner]]
DEFAULT: Planners = {"default": DefaultLoadPlanner}
PLANNERS: Planners = {**DEFAULT, "rng": RNGLoadPlanner}

# The weights of Llama 3 8B, the vocabulary rounded up from 128,256 so that 1,024 ranks divide it.
MODEL = "Llama 3 8B"
_LAYER = [
    *[(4096, 4096)] * 2,  # query, output
    *[(1024, 4096)] * 2,  # key, value
    *[(14336, 4096)] * 2,  # gate, up
    (4096, 14336),  # down
    *[(4096,)] * 2,  # norms
]
MODEL_SHAPES: list[tuple[int, ...]] = [*[(131072, 4096)] * 2, (4096,), *_LAYER * 32]


@dataclass(frozen=True)
class Planning:
    """One checkpoint of so many ranks: CPU seconds, and bytes of the metadata.

    Attributes:
        ranks: Number of ranks.
        local_plan: One rank's plan of a save. All ranks make theirs at once.
        global_plan: The coordinator's.
        load_plan: One rank's plan of a load, by planner; of records alone.
        metadata_bytes: What ``.metadata`` takes: the plan, and where in which file the bytes are.
    """

    ranks: int
    local_plan: float
    global_plan: float
    load_plan: dict[str, float]
    metadata_bytes: int

    @property
    def save_seconds(self) -> float:
        return self.local_plan + self.global_plan


@dataclass(frozen=True)
class Scale:
    """Plans by what is in the checkpoint, each list by number of ranks.

    ``tensor`` is an existing tensor of as many bytes as the records.
    """

    records: list[Planning]
    tensor: list[Planning]
    rank_named: list[Planning]
    model_and_records: list[Planning]

    def shares(self) -> dict[int, float]:
        """Return by number of ranks which part of a plan of model and records is the records'.

        From the records' own plan: the difference of two plans that take seconds is mostly noise.
        """
        own = {planning.ranks: planning.save_seconds for planning in self.records}
        return {
            planning.ranks: own[planning.ranks] / planning.save_seconds
            for planning in self.model_and_records
        }


def measure(
    sizes: Sequence[int], compared_sizes: Sequence[int], model_sizes: Sequence[int]
) -> Scale:
    """Plan at all sizes.

    Args:
        sizes: Numbers of ranks, at least two.
        compared_sizes: Those of them to plan with a tensor and with rank-named keys instead.
        model_sizes: Those of them to plan together with a model, powers of 2 up to 1,024.
    """
    # DCP asks the fake group for its device, which it has more than one of.
    warnings.filterwarnings("ignore", message=".*_get_pg_default_device|Multiple backends")
    return Scale(
        records=[plan(size, records, PLANNERS) for size in sizes],
        tensor=[plan(size, tensor, DEFAULT) for size in compared_sizes],
        rank_named=[plan_rank_named(size) for size in compared_sizes],
        model_and_records=[plan(size, model_and_records, {}) for size in model_sizes],
    )


def tensor() -> dict[str, Any]:
    return {"tensor": sharded_tensor()}


def records() -> dict[str, Any]:
    return {"rng": StatefulRNG(seed=0, ranked=True).state_dict()}


def model_and_records() -> dict[str, Any]:
    """Return this rank's part of the records and of a model that FSDP2 has sharded."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    model = {}
    for number, (length, *others) in enumerate(MODEL_SHAPES):
        part = torch.empty(length // ranks, *others, device="meta")
        model[f"weight_{number}"] = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    return {"model": model, **records()}


def plan(ranks: int, state_of: Callable[[], dict[str, Any]], planners: Planners) -> Planning:
    """Plan a checkpoint of what every rank passes."""
    plans = plans_of_all_ranks(ranks, state_of)
    # The last rank's chunks are the last ones that a planner comes to.
    create_fake_group(ranks - 1, ranks)
    planning = time_planning(state_of, plans, planners)
    dist.destroy_process_group()
    return planning


def plan_rank_named(ranks: int) -> Planning:
    """Plan a checkpoint in which every rank has keys of its own; DCP needs no group for that."""
    state = {"rng": rank_named(0)}
    values = state["rng"]["rank_0"]
    states = ({"rng": {f"rank_{rank}": values}} for rank in range(ranks))
    plans = [as_received(local_plan(state)) for state in states]
    return time_planning(lambda: state, plans, DEFAULT)


def plans_of_all_ranks(ranks: int, state_of: Callable[[], dict[str, Any]]) -> list[SavePlan]:
    """Return what every rank sends for DTensors that are sharded evenly along dim 0."""
    create_fake_group(0, ranks)
    own = local_plan(state_of())
    plans = [as_received(plan_of_rank(own, rank)) for rank in range(ranks)]
    for rank in {1, ranks // 2, ranks - 1}:
        create_fake_group(rank, ranks)
        if plans[rank] != local_plan(state_of()):
            raise RuntimeError(f"the derived plan of rank {rank} is not what DCP makes there")
    return plans


def create_fake_group(rank: int, ranks: int) -> None:
    """Make this process one rank of a world whose collectives do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def local_plan(state: dict[str, Any]) -> SavePlan:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state)
    return planner.create_local_plan()


def plan_of_rank(own: SavePlan, rank: int) -> SavePlan:
    """Return another rank's plan, given rank 0's."""
    items = [item_of_rank(item, rank) for item in own.items]
    return replace(own, items=items, planner_data=dict(own.planner_data))


def item_of_rank(item: WriteItem, rank: int) -> WriteItem:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    offsets = torch.Size((rank * chunk.sizes[0], *chunk.offsets[1:]))
    moved = replace(item.tensor_data, chunk=replace(chunk, offsets=offsets))
    return replace(item, index=replace(item.index, offset=offsets), tensor_data=moved)


def as_received(plan: SavePlan) -> SavePlan:
    """Return the plan as the coordinator gets it: a copy that shares nothing with other plans."""
    received: SavePlan = pickle.loads(pickle.dumps(plan))
    return received


def time_planning(
    state_of: Callable[[], dict[str, Any]],
    plans: list[SavePlan],
    planners: Planners,
) -> Planning:
    """Time one rank's local plan, the coordinator's global plan and one rank's load plans.

    Garbage collection waits: when it strikes is chance.

    Args:
        state_of: Returns a rank's state.
        plans: The local plans of all ranks.
        planners: What to plan the load with, by name.
    """
    state = state_of()
    gc.collect()
    gc.disable()
    local = statistics.median(cpu_seconds(lambda: local_plan(state))[0] for _ in range(ROUNDS))
    global_plan, (_, metadata) = cpu_seconds(lambda: DefaultSavePlanner().create_global_plan(plans))
    load = {
        name: statistics.median(
            load_seconds(planner(), state_of(), metadata) for _ in range(ROUNDS)
        )
        for name, planner in planners.items()
    }
    gc.enable()
    return Planning(len(plans), local, global_plan, load, written_bytes(plans, metadata))


def written_bytes(plans: Sequence[SavePlan], metadata: Metadata) -> int:
    """Return the size of ``.metadata`` where each rank has written its items into a file."""
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_0.distcp", place * ITEM_BYTES, ITEM_BYTES)
        for rank, plan in enumerate(plans)
        for place, item in enumerate(plan.items)
    }
    return len(pickle.dumps(metadata))


def load_seconds(planner: LoadPlanner, state: dict[str, Any], metadata: Metadata) -> float:
    started = time.process_time()
    planner.set_up_planner(state, metadata)
    planner.create_local_plan()
    return time.process_time() - started


def exponent(plannings: Iterable[Planning]) -> float:
    """Return the exponent with which the seconds that planning a save takes grow."""
    sizes, seconds = zip(
        *((float(planning.ranks), planning.save_seconds) for planning in plannings), strict=True
    )
    return growth(sizes, seconds)


def sections(scale: Scale) -> list[Section]:
    return [of_saves(scale), of_loads(scale)]


def of_saves(scale: Scale) -> Section:
    ours = {planning.ranks: planning for planning in scale.records}
    rows = []
    for named in scale.rank_named:
        planning = ours[named.ranks]
        times = Target.at_least(200, named.save_seconds / planning.save_seconds, "x less")
        target = times if named is scale.rank_named[-1] else None
        cells = text(planning.save_seconds), text(named.save_seconds)
        rows.append(Row(f"{planning.ranks:,} ranks", *cells, target))
    first, last = scale.records[0], scale.records[-1]
    # Linear but for DCP's sorting of chunks: n log n has an exponent of 1.1 here.
    power = Target.at_most(1.2, exponent(scale.records))
    rows.append(Row(f"exponent, {first.ranks} to {last.ranks:,} ranks", "", "", power))
    for ranks, share in scale.shares().items():
        target = Target.at_most(1, 100 * share, "%")
        rows.append(Row(f"share beside {MODEL}, {ranks:,} ranks", "", "", target))
    # What a rank adds: what is said once, such as the key, does not count.
    added = (last.metadata_bytes - first.metadata_bytes) / (last.ranks - first.ranks)
    target = Target.at_most(160, added, " bytes")
    rows.append(Row(f"metadata a rank, up to {last.ranks:,} ranks", "", "", target))
    return Section("planning a save, CPU time", "rank-named keys", rows)


def of_loads(scale: Scale) -> Section:
    ranks, ours = scale.records[-1].ranks, scale.records[-1].load_plan
    limit = Target.at_most(10, 1e3 * ours["rng"], " ms")
    beside = text(scale.tensor[-1].load_plan["default"])
    rows = [
        Row("plain dcp.load", text(ours["default"]), beside),
        Row("RNGLoadPlanner", text(ours["rng"]), "", limit),
    ]
    title = f"planning a load, one of {ranks:,} ranks, CPU time"
    return Section(title, "an existing tensor", rows)
