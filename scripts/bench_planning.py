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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rng_dcp import StatefulRNG
from scripts.bench_timing import Target, columns, growth
from scripts.bench_ways import rank_named

COMPARED_SIZE = 16384
"""Ranks at which the two ways are compared; measured or, above what was measured, extrapolated."""

LOCAL_ROUNDS = 5

# The weights of Llama 3 8B, the vocabulary rounded up from 128,256 so that 1,024 ranks divide it.
# A third of them is wider than tall (key, value and down projections), so DCP, which sweeps a
# tensor along its longest dimension, compares every pair of their chunks, as it does those of our
# tables while they have fewer than 628 rows.
MODEL = "Llama 3 8B"
_LAYER = [
    *[(4096, 4096)] * 2,  # query, output
    *[(1024, 4096)] * 2,  # key, value
    *[(14336, 4096)] * 2,  # gate, up
    (4096, 14336),  # down
    *[(4096,)] * 2,  # norms
]
MODEL_SHAPES: list[tuple[int, ...]] = [*[(131072, 4096)] * 2, (4096,), *_LAYER * 32]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Planning:
    """One checkpoint of so many ranks: CPU seconds, and bytes of the pickled metadata."""

    ranks: int
    local_plan: float
    global_plan: float
    load_plan: float
    metadata_bytes: int

    @property
    def save_seconds(self) -> float:
        """One rank's local plan (all ranks make theirs at once) and the coordinator's."""
        return self.local_plan + self.global_plan


@dataclass(frozen=True)
class Scale:
    """Plans by what is in the checkpoint, each list by number of ranks."""

    tables: list[Planning]
    rank_named: list[Planning]
    model_and_tables: list[Planning]

    def share(self, together: Planning) -> float:
        """Return what the tables are of a plan of model and tables together.

        From the tables' own plan: the difference of two plans that take seconds is mostly noise.
        """
        own = next(planning for planning in self.tables if planning.ranks == together.ranks)
        return own.save_seconds / together.save_seconds


def measure(sizes: Sequence[int], rank_named_limit: int, model_sizes: Sequence[int]) -> Scale:
    """Measure all sizes.

    Args:
        sizes: Numbers of ranks, at least two of them up to ``rank_named_limit``.
        rank_named_limit: The largest size for rank-named keys.
        model_sizes: Those of the sizes to plan together with a model, powers of 2 up to 1,024.
    """
    # DCP asks the fake group for its device, which it has more than one of.
    warnings.filterwarnings("ignore", message=".*_get_pg_default_device|Multiple backends")
    named = [size for size in sizes if size <= rank_named_limit]
    return Scale(
        tables=[plan(size, tables) for size in sizes],
        rank_named=[plan_rank_named(size) for size in named],
        model_and_tables=[plan(size, model_and_tables) for size in model_sizes],
    )


def tables() -> dict[str, Any]:
    return {"rng": StatefulRNG(seed=0, ranked=True).state_dict()}


def model_and_tables() -> dict[str, Any]:
    """Return this rank's part of the tables and of a model that FSDP2 has sharded."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    model = {}
    for number, (length, *others) in enumerate(MODEL_SHAPES):
        part = torch.empty(length // ranks, *others, device="meta")
        model[f"weight_{number}"] = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    return {"model": model, **tables()}


def plan(ranks: int, state_of: Callable[[], dict[str, Any]]) -> Planning:
    """Plan a checkpoint of what every rank passes."""
    plans = plans_of_all_ranks(ranks, state_of)
    create_fake_group(0, ranks)
    planning = time_planning(state_of(), plans)
    dist.destroy_process_group()
    return planning


def plan_rank_named(ranks: int) -> Planning:
    """Plan a checkpoint in which every rank has keys of its own; DCP needs no group for that."""
    state = {"rng": rank_named(0)}
    values = state["rng"]["rank_0"]
    states = ({"rng": {f"rank_{rank}": values}} for rank in range(ranks))
    return time_planning(state, [as_received(local_plan(state)) for state in states])


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


def time_planning(state: dict[str, Any], plans: list[SavePlan]) -> Planning:
    """Time one rank's local plan, the coordinator's global plan and one rank's load plan.

    In CPU seconds, which other jobs on the machine hardly change, of one thread, which is all that
    works here. Garbage collection waits: when it strikes is chance.

    Args:
        state: Rank 0's state.
        plans: The local plans of all ranks.
    """
    gc.collect()
    gc.disable()
    local = [cpu_seconds(lambda: local_plan(state))[0] for _ in range(LOCAL_ROUNDS)]
    global_plan, (_, metadata) = cpu_seconds(lambda: DefaultSavePlanner().create_global_plan(plans))
    load = [cpu_seconds(lambda: load_plan(state, metadata))[0] for _ in range(LOCAL_ROUNDS)]
    gc.enable()
    size = len(pickle.dumps(metadata))
    medians = statistics.median(local), global_plan, statistics.median(load)
    return Planning(len(plans), *medians, size)


def load_plan(state: dict[str, Any], metadata: Metadata) -> LoadPlan:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata)
    return planner.create_local_plan()


def cpu_seconds(call: Callable[[], _Result]) -> tuple[float, _Result]:
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def fit(plannings: Sequence[Planning]) -> float:
    """Return the exponent with which the seconds that planning a save takes grow.

    Between the three largest numbers of ranks: among few ranks it is lower, since there the part
    counts for more that does not grow.
    """
    last = plannings[-3:]
    sizes = [float(planning.ranks) for planning in last]
    return growth(sizes, [planning.save_seconds for planning in last])


def seconds_at(plannings: Sequence[Planning], ranks: int) -> tuple[float, bool]:
    """Return the seconds for so many ranks, and whether they were measured.

    If not, the fitted growth takes the largest measured number there.
    """
    last = plannings[-1]
    if last.ranks == ranks:
        return last.save_seconds, True
    return last.save_seconds * (ranks / last.ranks) ** fit(plannings), False


def table(scale: Scale) -> list[str]:
    lines = []
    for name, plannings in (("tables", scale.tables), ("rank-named keys", scale.rank_named)):
        rows: list[tuple[str, ...]] = [
            (name, "local plan, ms", "global plan, s", "load plan, ms", "metadata, MB")
        ]
        rows += [
            (
                f"{p.ranks:,} ranks",
                f"{p.local_plan * 1e3:.2f}",
                f"{p.global_plan:.3f}",
                f"{p.load_plan * 1e3:.1f}",
                f"{p.metadata_bytes / 1e6:.2f}",
            )
            for p in plannings
        ]
        lines += [*columns(rows), f"save plan: grows as ranks ** {fit(plannings):.2f}", ""]
    (ours, _), (theirs, measured) = compared(scale)
    lines.append(
        f"save plan at {COMPARED_SIZE:,} ranks: tables {ours:.2f} s, rank-named keys {theirs:.0f} s"
        f"{'' if measured else ' (extrapolated)'}, {theirs / ours:.0f} times as long"
    )
    rows = [(f"with {MODEL}, {len(MODEL_SHAPES)} FSDP2 tensors", "save plan, s", "share of RNG")]
    rows += [
        (f"{p.ranks:,} ranks", f"{p.save_seconds:.2f}", f"{scale.share(p):.1%}")
        for p in scale.model_and_tables
    ]
    return [*lines, "", *columns(rows)]


def compared(scale: Scale) -> tuple[tuple[float, bool], tuple[float, bool]]:
    """Return for tables and for rank-named keys what :func:`seconds_at` says of the same size."""
    return seconds_at(scale.tables, COMPARED_SIZE), seconds_at(scale.rank_named, COMPARED_SIZE)


def targets(scale: Scale) -> list[Target]:
    (ours, _), (theirs, _) = compared(scale)
    return [
        # Linear but for DCP's sorting of chunks: n log n has an exponent of 1.1 here.
        Target.at_most(1.2, "save plan of the tables, exponent", [fit(scale.tables)]),
        Target.at_most(
            1 / 50, f"save plan at {COMPARED_SIZE:,} ranks, tables / rank-named", [ours / theirs]
        ),
        *(
            Target.at_most(
                3.0,
                f"share of RNG beside a model, {together.ranks:,} ranks, %",
                [100 * scale.share(together)],
            )
            for together in scale.model_and_tables
        ),
    ]


def as_json(scale: Scale) -> dict[str, Any]:
    return {
        **asdict(scale),
        "exponents": {"tables": fit(scale.tables), "rank_named": fit(scale.rank_named)},
        "shares": [scale.share(together) for together in scale.model_and_tables],
    }
