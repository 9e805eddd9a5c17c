"""``explain`` foretells what real loads do: random jobs save, and random jobs load by planner.

Example ``i`` is made of ``random.Random(i)`` alone. ``FUZZ_FIRST=<i> FUZZ_LOADS=1`` runs it by
itself; ``make fuzz`` runs 200.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from nemo_rng_dcp.generators import GeneratorSet, own_device
from tests.support.command import Capture, ask_json
from tests.support.jobs import job
from tests.support.streams import draw, warned

FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
LOADS = int(os.environ.get("FUZZ_LOADS", "10"))

MAKERS: dict[str, Any] = {
    "noise": lambda seed: torch.Generator().manual_seed(seed),
    "shuffle": lambda seed: np.random.default_rng(seed),
    "choice": lambda seed: random.Random(seed),
}

Streams = dict[str, str]
"""Fingerprints by generator."""


@dataclass(frozen=True)
class Spec:
    """A job: its ranks, and what each of them gives ``StatefulRNG``."""

    size: int
    mesh: dict[str, int] | None
    along: tuple[str, ...]
    logical_ranks: int | None
    ranked: bool
    global_generators: bool
    own: tuple[str, ...]
    shared: tuple[str, ...]

    @classmethod
    def any(cls, dice: random.Random) -> "Spec":
        size, mesh, along = dice.randint(1, 6), None, ()
        rows = size
        if dice.random() < 0.6:
            names = ("pp", "dp", "tp")[dice.choice([0, 1, 1]) :]
            mesh = dict(zip(names, _factors(dice, size, len(names)), strict=True))
            along = tuple(dice.sample(names, dice.randint(1, len(names))))
            along = tuple(name for name in names if name in along)
            rows = prod(mesh[name] for name in along)
        logical_ranks = rows * dice.randint(1, 3) if dice.random() < 0.4 else None
        kinds = {name: dice.choice(["own", "own", "shared", "none"]) for name in MAKERS}
        own, shared = ([n for n, kind in kinds.items() if kind == k] for k in ("own", "shared"))
        has_global = dice.random() < 0.8 or not own + shared
        ranked = logical_ranks is not None or dice.random() < 0.5
        return cls(size, mesh, along, logical_ranks, ranked, has_global, tuple(own), tuple(shared))

    def rng(self, seed: int) -> StatefulRNG:
        """Return what a rank of the job has, its streams at places that depend on ``seed``."""
        mesh = None
        if self.mesh is not None:
            names = tuple(self.mesh)
            mesh = init_device_mesh("cpu", tuple(self.mesh.values()), mesh_dim_names=names)
            mesh = mesh[self.along]
        row = 0 if mesh is None else mesh.get_rank()
        rng = StatefulRNG(
            42,
            self.ranked,
            mesh=mesh,
            generators={name: MAKERS[name](seed + row) for name in self.own},
            shared_generators={name: MAKERS[name](seed) for name in self.shared},
            global_generators=self.global_generators,
            logical_ranks=self.logical_ranks,
        )
        for rank in rng.ranks:
            with rng.as_rank(rank):
                draw(1 + seed % 2)
        return rng

    def words(self) -> list[object]:
        """Return the job as ``explain`` is told of it."""
        generators = GeneratorSet(own_device()).slots if self.global_generators else ()
        words: list[object] = ["--world-size", self.size]
        words += ["--generators", ",".join((*generators, *self.own, *self.shared))]
        words += ["--shared", ",".join(self.shared), f"--{'' if self.ranked else 'no-'}ranked"]
        if self.logical_ranks is not None:
            words += ["--logical-ranks", self.logical_ranks]
        if self.mesh is not None:
            sizes = ",".join(f"{name}={size}" for name, size in self.mesh.items())
            words += ["--mesh", sizes, "--along", ",".join(self.along)]
        return words


def _factors(dice: random.Random, size: int, count: int) -> Iterator[int]:
    for _ in range(count - 1):
        factor = dice.choice([n for n in range(1, size + 1) if size % n == 0])
        yield factor
        size //= factor
    yield size


def streams(rng: StatefulRNG) -> dict[int, Streams]:
    found = {}
    for rank in rng.ranks:
        with rng.as_rank(rank):
            found[rank] = rng.fingerprint()
    return found


def save_real(path: Path, spec: Spec) -> None:
    dcp.save({"rng": spec.rng(42)}, checkpoint_id=path)


def load_real(
    path: Path, spec: Spec, planned: bool
) -> tuple[dict[int, Streams], dict[int, Streams], list[str]]:
    """Return the streams by row before and after the load, and what was said."""
    rng = spec.rng(1001)
    before, planner = streams(rng), RNGLoadPlanner() if planned else None
    messages = warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path, planner=planner))
    return before, streams(rng), messages


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("example", range(FIRST, FIRST + LOADS))
def test_a_load_does_what_explain_foretells(example: int, tmp_path: Path, capsys: Capture) -> None:
    dice = random.Random(example)
    saved, resumed = Spec.any(dice), Spec.any(dice)
    if example % 5 == 0:
        resumed = saved
    job(saved.size, save_real, tmp_path, saved)
    (entry,) = ask_json(capsys, "explain", tmp_path, *resumed.words())["entries"]
    fates = {fate["row"]: fate for fate in entry["fates"] if fate["ranks"]}
    planned = entry["needs_planner"] or dice.random() < 0.5
    loaded = job(resumed.size, load_real, tmp_path, resumed, planned)
    about = f"FUZZ_FIRST={example}: {saved} resumed as {resumed}"
    device = list(GeneratorSet(own_device()).slots)[3:]
    expected = ["RNG state: " + ". ".join(entry["remarks"])] if entry["remarks"] else []
    for rank, (before, after, messages) in enumerate(loaded):
        for row in before:
            fate = fates[row]
            assert rank in fate["ranks"], about
            # Only a process that has the device knows what a seed makes of its generator.
            foretold = fate["fingerprints"]
            new = {name: after[row][name] for name, digits in foretold.items() if digits == "?"}
            assert list(new) in ([], device), about
            assert after[row] == {**before[row], **foretold, **new}, about
            forked = [name for name in after[row] if name in fate["forked"]]
            assert forked == fate["forked"], about
            assert fate["fate"] != "refused", about
            assert (fate["fate"] == "continued") == (row == fate["source"]), about
        if 0 in before:
            assert messages == expected, about
        for message in messages:  # of another row, which says of its generators what row 0 does
            assert message.partition(": ")[2] in ". ".join(entry["remarks"]), about
    assert {row for before, _, _ in loaded for row in before} == fates.keys(), about
    dropped = [fate["row"] for fate in entry["fates"] if not fate["ranks"]]
    assert dropped == list(range(entry["rows"], entry["rows_saved"])), about
