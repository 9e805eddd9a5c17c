"""What the elastic recipe's reduction and norm cost beside FSDP2's and torch's own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from nemo_rng_dcp import ScopedRNG, StatefulRNG
from scripts.bench.ranks import LIMIT, Seconds, slowest, timed
from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from reduction import reduce_in_order
from shards import clip_grad_norm_

LOGICAL_RANKS = 8
WIDTH, LAYERS, BATCH = 256, 4, 8

WAYS = ["in order", "own", "own, once"]
"""Of summing gradients; FSDP2's own with each micro-batch, or once a step."""


@dataclass(frozen=True)
class Elastic:
    """What one number of processes measured.

    Attributes:
        processes: Their number; the logical ranks are shared out among them.
        gradients: Bytes of all gradients.
        seconds: The CPU seconds of the slowest process, of every round: ``step`` by way, ``norm``.
        sent: By way: bytes that a process sends to others to sum the gradients of one step.
        held: By way: bytes of gradients that a process holds at most between the backward passes of
            two modules.
    """

    processes: int
    gradients: int
    seconds: Seconds
    sent: dict[str, int]
    held: dict[str, int]


def measure(processes: Sequence[int], rounds: int) -> list[Elastic]:
    """Train steps in every way, in turns, on new processes."""
    return [_launch(count, rounds) for count in processes]


def _launch(processes: int, rounds: int) -> Elastic:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp"])
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        of_rank = partial(_be_a_rank, processes=processes, rounds=rounds, folder=folder)
        first, *_ = pool.map(of_rank, range(processes))
    return first


def _be_a_rank(rank: int, processes: int, rounds: int, folder: str) -> Elastic:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=processes, timeout=LIMIT
    )
    found = _measure(rounds)
    dist.barrier()
    dist.destroy_process_group()
    return found


def _measure(rounds: int) -> Elastic:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rng = StatefulRNG(seed=0, ranked=True, logical_ranks=LOGICAL_RANKS)
    models = {way: _model(mesh) for way in WAYS}
    reductions = reduce_in_order(models["in order"], mesh, rng)
    counting = []
    for module in models["own"].modules():
        if isinstance(module, FSDPModule):
            counting.append(_Counting())
            module.set_custom_reduce_scatter(counting[-1])  # type: ignore[arg-type]
    seconds: Seconds = {}
    norms: dict[str, Callable[..., object]] = {
        "in order": partial(clip_grad_norm_, max_norm=1.0, mesh=mesh),
        "own": partial(nn.utils.clip_grad_norm_, max_norm=1.0),
    }
    for round_number in range(-1, rounds):
        counts = seconds if round_number >= 0 else {}
        for way, model in models.items():
            timed(counts, "step", way, partial(_step, model, rng, once=way == "own, once"))
        for way, norm in norms.items():
            timed(counts, "norm", way, partial(norm, list(models[way].parameters())))
        for model in models.values():
            model.zero_grad()
    size = sum(weight.numel() * 4 for weight in models["own"].parameters())
    steps, sent = rounds + 1, sum(comm.bytes_sent for comm in counting)
    share = len(rng.ranks)
    return Elastic(
        dist.get_world_size(),
        size,
        slowest(seconds),
        {
            "in order": sum(reduction.bytes_sent for reduction in reductions) // steps,
            "own": sent // steps,
            "own, once": sent // steps // share,
        },
        {
            "in order": sum(reduction.bytes_held for reduction in reductions),
            "own": size // dist.get_world_size(),
            "own, once": size,
        },
    )


class _Counting:
    """FSDP2's own reduce-scatter, which counts what a process sends: all but its own part."""

    bytes_sent = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self.bytes_sent += input_tensor.nbytes - output_tensor.nbytes
        # torch 2.13 renamed it.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return scatter(output_tensor, input_tensor, op, group, async_op)


def _model(mesh: DeviceMesh) -> Any:
    with ScopedRNG(0):
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    model = nn.Sequential(*layers)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
    return model


def _step(model: Any, rng: StatefulRNG, once: bool) -> None:
    for rank in rng.ranks:
        with rng.as_rank(rank):
            if once:
                model.set_requires_gradient_sync(rank == rng.ranks[-1])
            model(torch.rand(BATCH, WIDTH)).square().mean().backward()


def sections(measured: Sequence[Elastic]) -> list[Section]:
    return [_section(found) for found in measured]


def _section(found: Elastic) -> Section:
    step, norm = found.seconds["step"], found.seconds["norm"]
    limit = Target.ratio(1.1, step["in order"], step["own"])
    rows = [
        Row("a step, CPU time", text(step["in order"]), text(step["own"]), limit),
        Row("  FSDP2's own, once a step", "", text(step["own, once"])),
        Row("clip_grad_norm_, CPU time", text(norm["in order"]), text(norm["own"])),
    ]
    for title, by_way in (("sent", found.sent), ("held", found.held)):
        shares = {way: f"{number / found.gradients:.2f}x" for way, number in by_way.items()}
        rows.append(Row(f"bytes {title} / gradients", shares["in order"], shares["own"]))
        rows.append(Row("  FSDP2's own, once a step", "", shares["own, once"]))
    title = f"gradients of {LOGICAL_RANKS} logical ranks, {found.processes} processes"
    return Section(title, "FSDP2's own", rows)
