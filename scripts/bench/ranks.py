"""What every rank of the checkpoint benchmark does, on real ranks with a real gloo group."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from scripts.bench.timing import cpu_seconds, rotated
from scripts.bench.ways import (
    Beside,
    FilePerRank,
    Gathered,
    RankNamed,
    Way,
    alone,
    existing_tensor,
    least,
    stateful_rng,
)

PRELOADED = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo", "fsspec"]
"""The last two are what a first save and load import."""

LIMIT = timedelta(seconds=60)
"""A rank that waits longer for another one raises."""

Seconds = dict[str, dict[str, list[float]]]
"""By operation (``save``) and way (``record``): the CPU seconds of every round."""


WAYS: dict[str, Callable[[int], Way]] = {
    "alone": alone,
    "record": stateful_rng,
    "tensor": existing_tensor,
    "least": least,
    "file_per_rank": FilePerRank,
    "gathered": Gathered,
    "rank_named": RankNamed,
}
STORE_NO_STREAMS = ("alone", "tensor", "least")


class Size(NamedTuple):
    """A model of ``layers`` square matrices, how many rounds to measure beside it, and which ways.

    The first two ways are measured beside all models. ``copies`` of what a way adds are in one
    checkpoint.
    """

    width: int
    layers: int
    rounds: int
    ways: tuple[str, ...] = tuple(WAYS)
    copies: int = 1


class App:
    """A model that FSDP2 has sharded and its optimizer, as one entry of a checkpoint."""

    def __init__(self, size: Size) -> None:
        layers = [nn.Linear(size.width, size.width, bias=False) for _ in range(size.layers)]
        self.parameters = size.layers * size.width**2
        self._model = nn.Sequential(*layers)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self._model, mesh=mesh)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._model(torch.ones(1, size.width)).sum().backward()
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def launch(ranks: int, sizes: list[Size], folder: Path) -> list[dict[str, Any]]:
    """Measure beside every model on new processes, a rank each.

    Args:
        ranks: Number of ranks.
        sizes: The models.
        folder: An empty one, for the checkpoints.

    Returns:
        What :func:`measure` returns on rank 0, by model.

    A rank that raises ends the measurement with its error.
    """
    # Ranks are forks of a process that has imported torch, and has used nothing of it yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    rank = partial(be_a_rank, ranks=ranks, sizes=sizes, folder=folder)
    with ProcessPoolExecutor(ranks, mp_context=context) as pool:
        results = list(pool.map(rank, range(ranks)))
    return results[0]


def be_a_rank(rank: int, ranks: int, sizes: list[Size], folder: Path) -> list[dict[str, Any]]:
    """Measure as one rank of :func:`launch`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=LIMIT)
    results = [measure(size, folder / "checkpoints") for size in sizes]
    dist.barrier()
    dist.destroy_process_group()
    return results


def measure(size: Size, out: Path) -> dict[str, Any]:
    """Measure beside a model of one size; returns what ``checkpoint.Checkpoint`` is made of."""
    app = App(size)
    ways = {name: WAYS[name](size.copies) for name in size.ways}
    # Collections of garbage strike at random; between the rounds they hit no one way.
    gc.disable()
    seconds: Seconds = {}
    measure_rounds(seconds, ways, app, out, size.rounds)
    measure_async_rounds(seconds, ways, app, out, size.rounds)
    gc.enable()
    return {
        "ranks": dist.get_world_size(),
        "parameters": app.parameters,
        "copies": size.copies,
        "seconds": slowest(seconds),
        "on_disk": {name: on_disk(place(out, name)) for name in ways},
    }


def measure_rounds(
    seconds: Seconds, ways: dict[str, Way], app: App, out: Path, rounds: int
) -> None:
    """Time every way once a round, after one that only warms up: A B C, then B C A, ...

    Before each turn of saves and of loads one more is made that does not count: the first after
    something else takes longer than the next, by more than what is measured.
    """
    for name, way in ways.items():
        check(name, way, app, place(out, name))
    for round_number in range(rounds):
        gc.collect(1)  # what the last round left; what is older stays
        order = rotated(list(ways), round_number)
        last = order[-1]
        ways[last].save(app, fresh(place(out, last)))
        for name in order:
            timed(seconds, "save", name, partial(ways[name].save, app, fresh(place(out, name))))
        ways[last].load(app, place(out, last))
        for name in order:
            timed(seconds, "load", name, partial(ways[name].load, app, place(out, name)))


def measure_async_rounds(
    seconds: Seconds, ways: dict[str, Way], app: App, out: Path, rounds: int
) -> None:
    """Time what ``async_save`` does before it returns, without and with streams."""
    record = ways["record"]
    assert isinstance(record, Beside)
    states = {"alone": {"app": app}, "record": {"app": app, **record.entries}}
    for round_number in range(-1, rounds):
        gc.collect(1)
        order = rotated(list(states), round_number)
        for turn, name in enumerate([order[-1], *order]):
            call = partial(dcp.async_save, states[name], checkpoint_id=fresh(out / "async"))
            counts = round_number >= 0 and turn > 0  # as above
            written = timed(seconds if counts else {}, "async_save", name, call)
            assert isinstance(written, Future)
            written.result()


def check(name: str, way: Way, app: App, folder: Path) -> None:
    """Make sure that a way which is timed brings this rank's streams back."""
    way.save(app, fresh(folder))
    expected = torch.rand(3)
    way.load(app, folder)
    if name not in STORE_NO_STREAMS and not torch.equal(torch.rand(3), expected):
        raise RuntimeError(f"{name} did not bring back the streams of rank {dist.get_rank()}")


def fresh(folder: Path) -> Path:
    """Remove what an earlier round left there, so that every round writes new files."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    return folder


def timed(seconds: Seconds, operation: str, way: str, call: Callable[[], object]) -> object:
    """Append the seconds that a call takes on this rank, and return its result.

    All ranks start together.
    """
    dist.barrier()
    spent, result = cpu_seconds(call)
    seconds.setdefault(operation, {}).setdefault(way, []).append(spent)
    return result


def slowest(seconds: Seconds) -> Seconds:
    """Return for every round the seconds of the rank that took longest."""
    ranks: list[Seconds] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, seconds)
    return {
        operation: {
            way: list(map(max, *(rank[operation][way] for rank in [*ranks, ranks[0]])))
            for way in ways
        }
        for operation, ways in seconds.items()
    }


def place(out: Path, way: str) -> Path:
    """Return the folder of a way's checkpoint; ``.metadata`` has it, so all are equally long."""
    return out / f"{way:_<13}"


def on_disk(folder: Path) -> dict[str, int]:
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {"files": len(sizes), "bytes": sum(sizes.values()), "metadata": sizes[".metadata"]}
