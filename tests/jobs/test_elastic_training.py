"""Whole trainings on logical ranks: equal bits at every step on 4, then 1, then 2 processes.

Compared are the loss of every logical rank, the norm of the gradients, and a hash of all weights
and optimizer states. Each trap has a control beside it, which has to differ.
"""

import hashlib
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from nemo_rng_dcp import ScopedRNG, StatefulRNG
from tests.support.jobs import job

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "recipes"))
from reduction import OrderedSum, WholeGradients, reduce_in_order
from shards import clip_grad_norm_

LEAVES_OUT = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
"""Whether odd ranks leave a layer out: FSDP2 of an older torch, such as 2.9, cannot."""

LOGICAL_RANKS = 4
SCHEDULE = [(4, range(2)), (1, range(2, 3)), (2, range(3, 4))]
"""How many processes train which steps."""

STEPS = range(4)
VOCABULARY, WIDTH, MAX_NORM = 11, 6, 0.05
HIDDEN = 14 if torch.__version__ >= "2.10" else 16
"""torch 2.9's full_tensor() loses rows where shards of tensor-parallel shards differ in size."""

Trace = dict[tuple[int, str], str]
"""By step, and logical rank, "norm" or "states": what was found, as hexadecimal digits."""

Traces = dict[str, Trace]


@dataclass(frozen=True)
class Kind:
    """How a training is done, or what is wrong with it."""

    layout: str = "fsdp2"  # or hsdp, tp, whole
    bf16: bool = False
    recomputes: bool = False
    by_tokens: bool = False
    fault: str = ""


KINDS = {
    "fsdp2: bf16, recomputed": Kind(bf16=True, recomputes=True),
    "hsdp: loss by tokens": Kind("hsdp", by_tokens=True),
    "tp": Kind("tp"),
    "by hand": Kind("whole"),
}
CONTROLS = {
    "reduced by fsdp2": Kind(fault="reduced by fsdp2"),
    "running statistics by process": Kind("whole", fault="running statistics by process"),
}


class Net(nn.Module):
    """Tied, frozen and partly unused weights, dropout, and, if whole, a BatchNorm."""

    def __init__(self, kind: Kind, context_fn: Any) -> None:
        super().__init__()
        self.context_fn, self.leaves_out = context_fn, LEAVES_OUT or kind.layout == "whole"
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused_by_odd = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if kind.layout == "whole" else nn.Identity()
        self.block = Block(HIDDEN)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, rank: int) -> torch.Tensor:
        x = self.frozen(self.tokens(tokens[:, :-1]))
        if rank % 2 == 0 or not self.leaves_out:
            x = x + self.unused_by_odd(x)
        x = self.norm(x.flatten(0, 1))
        if self.context_fn is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=False, context_fn=self.context_fn)
        return nn.functional.cross_entropy(
            self.head(x).float(), tokens[:, 1:].flatten(), reduction="sum"
        )


class Block(nn.Module):
    """Draws from NumPy's stream and from torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(x)) * (1 + np.random.random())
        return x + nn.functional.dropout(self.down(hidden), 0.3)


def meshes(layout: str) -> tuple[DeviceMesh, DeviceMesh | None]:
    """Return the mesh of FSDP2, and that of tensor parallelism."""
    processes = dist.get_world_size()
    if layout == "tp":
        root = init_device_mesh("cpu", (processes // 2, 2), mesh_dim_names=("dp", "tp"))
        return root["dp"], root["tp"]
    if layout == "hsdp":
        shape = (2, 2) if processes == 4 else (1, processes)
        return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")), None
    return init_device_mesh("cpu", (processes,)), None


class Training:
    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.mesh, tp = meshes(kind.layout)
        self.rng = StatefulRNG(3, ranked=True, logical_ranks=LOGICAL_RANKS, mesh=self.mesh)
        with ScopedRNG(5):
            self.model = Net(kind, self.rng.recompute if kind.recomputes else None)
        if tp is not None:
            plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.model.block, tp, plan)
        if kind.layout != "whole":
            precision = MixedPrecisionPolicy(torch.bfloat16 if kind.bf16 else None, torch.float32)
            for module in (self.model.block, self.model):
                fully_shard(module, mesh=self.mesh, mp_policy=precision)
            if kind.fault != "reduced by fsdp2":
                reduce_in_order(self.model, self.mesh, self.rng)
            elif LEAVES_OUT:
                self.model.set_reduce_scatter_unused_params(True)
        self.weights = dict(self.model.named_parameters())
        foreach = kind.layout != "tp"  # it takes no weights on several meshes
        # Of AdamW, which the recipe has, DTensor looks at three times as many operations anew in
        # each process.
        options = {"lr": 0.5, "momentum": 0.9, "foreach": foreach}
        self.optimizer = torch.optim.SGD(self.weights.values(), **options)
        for weight in self.weights.values():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        self.optimizer.step()  # makes the states; a load replaces them
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all weights, optimizer states and statistics, by name."""
        found: dict[str, torch.Tensor] = dict(self.model.named_buffers())
        for name, weight in self.weights.items():
            found[name] = weight.detach()
            found |= {f"{name}.{k}": state for k, state in self.optimizer.state[weight].items()}
        return found

    def state(self) -> dict[str, Any]:
        """Return what is saved now: torch 2.9 moves uneven shards at the first forward."""
        return {"rng": self.rng, **self.tensors()}

    def train(self, steps: range) -> Trace:
        trace: Trace = {}
        for step in steps:
            trace |= {(step, key): value for key, value in self.step().items()}
            trace[step, "states"] = digest(self.tensors())
        return trace

    def step(self) -> dict[str, str]:
        model, rng, kind = self.model, self.rng, self.kind
        found, batches = {}, {}
        for rank in rng.ranks:
            with rng.as_rank(rank):
                shape = (3, random.randint(4, 9))
                batches[rank] = torch.from_numpy(np.random.randint(VOCABULARY, size=shape))
        count = torch.tensor(sum(batch[:, 1:].numel() for batch in batches.values()))
        if kind.layout == "tp":
            dist.all_reduce(count, group=self.mesh.get_group())
        else:
            dist.all_reduce(count)
        parts = len(rng.ranks) if kind.fault == "reduced by fsdp2" else LOGICAL_RANKS
        gradients = WholeGradients(model, rng) if kind.layout == "whole" else None
        statistics, before = OrderedSum(rng), [buffer.clone() for buffer in model.buffers()]
        for rank, batch in batches.items():
            if kind.fault != "running statistics by process":
                set_buffers(model, before)
            with rng.as_rank(rank):
                loss = model(batch, rank)
                of_mean = parts * batch[:, 1:].numel()
                (loss / (count if kind.by_tokens else of_mean)).backward()
                if gradients is not None:
                    gradients.collect()
                    mean = [buffer.double().flatten() / LOGICAL_RANKS for buffer in model.buffers()]
                    total = statistics.total(torch.cat(mean))
            found[str(rank)] = loss.item().hex()
        if gradients is not None and kind.fault != "running statistics by process":
            assert total is not None
            set_buffers(model, list(total.split([buffer.numel() for buffer in before])))
        if gradients is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        else:
            wholes = [whole(w.grad) for w in self.weights.values() if w.grad is not None]
            expected = nn.utils.get_total_norm(wholes)
            norm = clip_grad_norm_(model.parameters(), MAX_NORM, self.mesh)
            torch.testing.assert_close(norm, expected)
        found["norm"] = whole(norm).item().hex()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found


def set_buffers(model: nn.Module, values: list[torch.Tensor]) -> None:
    for buffer, value in zip(model.buffers(), values, strict=True):
        buffer.copy_(value.view_as(buffer))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + whole(tensor).detach().numpy().tobytes())
    return found.hexdigest()


def play(path: Path, steps: range, kinds: dict[str, Kind]) -> Traces:
    """Train steps of each kind, from the checkpoint before them to one after them."""
    traces = {}
    for name, kind in kinds.items():
        own = steps
        if kind.layout == "tp" and dist.get_world_size() == 1:
            continue  # no two tensor-parallel ranks: those of the next job go on instead
        if kind.layout == "tp" and steps == SCHEDULE[2][1]:
            own = range(SCHEDULE[1][1][0], len(STEPS))
        training = Training(kind)
        if own[0]:
            dcp.load(training.state(), checkpoint_id=path / name / str(own[0]))
        traces[name] = training.train(own)
        if own[-1] + 1 < len(STEPS) and not kind.fault:
            dcp.save(training.state(), checkpoint_id=path / name / str(own[-1] + 1))
    return traces


def play_all(path: Path, steps: range) -> Traces:
    traces = play(path, steps, KINDS)
    return {**traces, **play(path, SCHEDULE[0][1], CONTROLS)} if steps[0] == 0 else traces


def merged(of_processes: list[Traces]) -> Traces:
    """Return what a job found; processes that know of the same thing agree, but for controls."""
    found: Traces = {}
    for traces in of_processes:
        for name, trace in traces.items():
            for key, value in trace.items():
                alike = found.setdefault(name, {}).setdefault(key, value) == value
                assert alike or name in CONTROLS, (name, key)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Of all kinds on 2 processes."""
    return merged(job(2, play_all, tmp_path_factory.mktemp("uninterrupted"), STEPS))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Of all kinds on 4, then 1, then 2 processes, through checkpoints."""
    path, found = tmp_path_factory.mktemp("resumed"), {}
    for processes, steps in SCHEDULE:
        for name, trace in merged(job(processes, play_all, path, steps)).items():
            found[name] = {**found.get(name, {}), **trace}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_bits_are_equal_at_every_step(
    kind: str, uninterrupted: Traces, resumed: Traces
) -> None:
    expected = uninterrupted[kind]
    assert expected.keys() == {
        (step, key) for step in STEPS for key in ("norm", "states", *map(str, range(LOGICAL_RANKS)))
    }
    assert resumed[kind] == expected
    assert len({expected[step, "states"] for step in STEPS}) == len(STEPS)


@pytest.mark.parametrize("fault", CONTROLS)
def test_a_control_differs(fault: str, uninterrupted: Traces, resumed: Traces) -> None:
    """On 2 and on 4 processes, after some steps; the first losses are those of equal weights."""
    on_2, on_4 = uninterrupted[fault], resumed[fault]
    assert on_2.keys() == on_4.keys()
    differing = {key for key in on_2 if on_2[key] != on_4[key]}
    assert (SCHEDULE[0][1][-1], "states") in differing
    assert not differing & {(0, str(rank)) for rank in range(LOGICAL_RANKS)}
