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
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target, cpu_seconds, growth
from scripts.bench.ways import OneNumber, rank_named

ROUNDS = 5
LOADING_RANKS = 8192
"""The job whose load plans are judged."""

Planners = Mapping[str, Callable[[], LoadPlanner]]
PLANNERS: Planners = {"default": DefaultLoadPlanner, "rng": RNGLoadPlanner}

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
    """One checkpoint of so many ranks: CPU seconds, and bytes of the pickled metadata.

    Attributes:
        ranks: Number of ranks.
        local_plan: One rank's plan of a save. All ranks make theirs at once.
        global_plan: The coordinator's.
        load_plan: One rank's plan of a load, by planner; of records alone.
        metadata_bytes: What the checkpoint's ``.metadata`` takes.
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

    ``one_number`` is the plan of the ranks whose loads are judged, with one number a rank.
    """

    records: list[Planning]
    one_number: Planning
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
    sizes: Sequence[int], rank_named_sizes: Sequence[int], model_sizes: Sequence[int]
) -> Scale:
    """Plan at all sizes.

    Args:
        sizes: Numbers of ranks, at least two.
        rank_named_sizes: Those of them to plan with rank-named keys.
        model_sizes: Those of them to plan together with a model, powers of 2 up to 1,024.
    """
    # DCP asks the fake group for its device, which it has more than one of.
    warnings.filterwarnings("ignore", message=".*_get_pg_default_device|Multiple backends")
    return Scale(
        records=[plan(size, records, PLANNERS) for size in sizes],
        one_number=plan(loading_ranks(sizes), one_number, {"default": DefaultLoadPlanner}),
        rank_named=[plan_rank_named(size) for size in rank_named_sizes],
        model_and_records=[plan(size, model_and_records, {}) for size in model_sizes],
    )


def loading_ranks(sizes: Sequence[int]) -> int:
    return LOADING_RANKS if LOADING_RANKS in sizes else sizes[-1]


def one_number() -> dict[str, Any]:
    return OneNumber().state_dict()


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
    return time_planning(lambda: state, plans, {})


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
    return Planning(len(plans), local, global_plan, load, len(pickle.dumps(metadata)))


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
    bytes_each = last.metadata_bytes / last.ranks
    target = Target.at_most(45, bytes_each, " bytes")
    rows.append(Row(f"metadata a rank, {last.ranks:,} ranks", "", "", target))
    return Section("planning a save, CPU time", "rank-named keys", rows)


def of_loads(scale: Scale) -> Section:
    ranks, floor = scale.one_number.ranks, scale.one_number.load_plan["default"]
    ours = next(planning.load_plan for planning in scale.records if planning.ranks == ranks)
    rows = [
        Row(title, text(ours[name]), beside, Target.at_most(10, 1e3 * ours[name], " ms"))
        for title, name, beside in (
            ("plain dcp.load", "default", text(floor)),
            ("RNGLoadPlanner", "rng", ""),
        )
    ]
    return Section(f"planning a load, one of {ranks:,} ranks, CPU time", "one number", rows)
