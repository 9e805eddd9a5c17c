"""Random schedules of a job on logical ranks: how many processes, how long, saved where.

What every logical rank must draw is computed here from seeds alone, with generators of its own:
nothing of the library switches or restores anything for it.
"""

import random
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG, derive_seed
from nemo_rng_dcp.generators import GeneratorSet

SEED, RANKS = 42, 8
SIZES = (1, 2, 4, 8)

Drawn = dict[tuple[int | str, int], list[float]]
"""By rank and step, what was drawn; by "all" and step, what was drawn for all ranks at once."""


@dataclass(frozen=True)
class Segment:
    """What one job does, from its start until it is killed.

    Attributes:
        size: Processes.
        seed: Of the choices that make no difference to what must be drawn.
        first: The step that every rank has not finished.
        played: Ranks that have finished it nevertheless, before the job began.
        steps: The job saves this many steps later.
        ahead: Ranks of each process that have finished one step more when it saves.
    """

    size: int
    seed: int
    first: int
    played: frozenset[int]
    steps: int
    ahead: int

    def ranks(self, process: int) -> range:
        per = RANKS // self.size
        return range(process * per, process * per + per)

    def order(self, step: int, ranks: range) -> list[int]:
        """Return in which order a process plays its ranks."""
        return random.Random(f"{self.seed} {step} {ranks[0]}").sample(ranks, len(ranks))

    def played_at_save(self) -> frozenset[int]:
        """Return the ranks that have finished the step in which it saves."""
        before = self.played if self.steps == 0 else frozenset()
        orders = [self.order(self.first + self.steps, self.ranks(i)) for i in range(self.size)]
        return before | {rank for order in orders for rank in order[: self.ahead]}


def schedule(seed: str, sizes: list[int]) -> Iterator[Segment]:
    """Yield the segments of a schedule, made of ``seed`` alone."""
    choices = random.Random(seed)
    first, played = 0, frozenset[int]()
    for size in sizes:
        ahead = choices.randrange(RANKS // size)
        segment = Segment(size, choices.getrandbits(32), first, played, choices.randrange(3), ahead)
        yield segment
        first, played = first + segment.steps, segment.played_at_save()


class Generators:
    """The generators of a job, or of one of its logical ranks alone."""

    def __init__(self, rank: int | None = None) -> None:
        self.noise, self.mersenne = torch.Generator(), random.Random(0)
        self.pcg, self.shared = np.random.default_rng(0), np.random.default_rng(7)
        self.python: Any = random
        self.numpy: Any = np.random
        self.torch = torch.default_generator
        if rank is not None:
            seeds = {n: derive_seed(SEED, "logical rank", rank, n, bits=64) for n in self.own()}
            self.mersenne.seed(seeds["mersenne"])
            self.pcg = np.random.default_rng(seeds["pcg"])
            GeneratorSet(None, {"noise": self.noise}, global_generators=False).restore(
                {}, {"noise": seeds["noise"]}
            )
            self.python, self.numpy = random.Random(SEED + rank), np.random.RandomState(SEED + rank)
            self.torch = torch.Generator().manual_seed(SEED + rank)

    def own(self) -> dict[str, Any]:
        return {"noise": self.noise, "mersenne": self.mersenne, "pcg": self.pcg}

    def draw(self, rank: int, step: int) -> list[float]:
        """Draw as a step of a rank does: another number of times on each."""
        drawn = [float(self.shared.random())]
        for _ in range(1 + (rank * 7 + step * 3) % 4):
            drawn += [self.python.random(), self.python.gauss(0, 1)]
            drawn += [float(self.numpy.random_sample()), float(self.numpy.standard_normal())]
            drawn += [torch.randn(1, generator=self.torch).item()]
            drawn += [torch.rand(1, generator=self.noise).item(), self.mersenne.gauss(0, 1)]
            drawn += [float(self.pcg.standard_normal())]
        return drawn

    def draw_outside(self, fault: str) -> list[float]:
        """Draw as a process does at the beginning of a step, for all of its ranks."""
        # With that fault such a draw is an error, so the ranks' own streams would not be seen.
        return [] if fault == "a switch left out" else [float(self.shared.random())]


def expected(steps: int, fault: str = "") -> Drawn:
    """Return what one uninterrupted run draws."""
    drawn: Drawn = {}
    for rank in range(RANKS):
        generators = Generators(rank)
        for step in range(steps):
            drawn["all", step] = generators.draw_outside(fault)
            drawn[rank, step] = generators.draw(rank, step)
    return drawn


def play(path: Path, schedules: list[list[Segment]], number: int, fault: str) -> list[Drawn]:
    """Play one segment of each schedule, as a process of a job; warnings are errors."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.9's own, in a save
    return [_play(path / str(i), schedule, number, fault) for i, schedule in enumerate(schedules)]


def _play(path: Path, schedule: list[Segment], number: int, fault: str) -> Drawn:
    segment, generators = schedule[number], Generators()
    by_process, drawn = fault == "streams of the process", Drawn()
    rng = StatefulRNG(
        SEED,
        ranked=True,
        logical_ranks=None if by_process else RANKS,
        generators=generators.own(),
        shared_generators={"shared": generators.shared},
    )
    ranks = segment.ranks(dist.get_rank())
    state = {"rng": rng}
    if number:
        _load(state, path / str(number - 1), random.Random(segment.seed))
    if fault == "rows exchanged":
        parked = rng._streams._moment.parked
        parked[ranks[1]], parked[ranks[2]] = parked[ranks[2]], parked[ranks[1]]
    last_step = segment.first + segment.steps
    for step in range(segment.first, last_step + 1):
        if step > segment.first or number == 0:
            drawn["all", step] = generators.draw_outside(fault)
        for place, rank in enumerate(segment.order(step, ranks)):
            if step == last_step and place == segment.ahead:
                with rng.as_rank(rank) if segment.seed % 2 and not by_process else nullcontext():
                    dcp.save(state, checkpoint_id=path / str(number))
                return drawn
            if step == segment.first and rank in segment.played:
                continue
            # Left out, the switch leaves the process with the rank that was played before.
            left_out = fault == "a switch left out" and rank == ranks[1]
            current = ranks[0] if left_out else rank
            with nullcontext() if by_process else rng.as_rank(current):
                drawn[rank, step] = generators.draw(rank, step)
    raise AssertionError("it never saved")


def _load(state: dict[str, StatefulRNG], path: Path, choices: random.Random) -> None:
    """Load in one of the ways, perhaps inside a rank, and go back if something drew since."""
    rng, way = state["rng"], choices.choice(["plain", "planner", "own"])
    with rng.as_rank(rng.ranks[-1]) if choices.random() < 0.5 else nullcontext():
        if way == "own":
            rng.load(path)
        else:
            planner = RNGLoadPlanner() if way == "planner" else None
            dcp.load(state, checkpoint_id=path, planner=planner)
    if choices.random() < 0.5:
        for rank in rng.ranks[:: choices.choice([1, 2])]:
            with rng.as_rank(rank):
                random.random(), np.random.random(), torch.rand(3)
        rng.rewind()
