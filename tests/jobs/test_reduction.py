"""The recipe's reduction: gradients and norms do not depend on the number of processes."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.jobs import job

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
sys.path.append(str(RECIPES))
from reduction import Tree, clip_grad_norm_, halved, reduce_in_order  # noqa: E402


class Found(NamedTuple):
    """A step's gradients before clipping, and their norm, as bytes."""

    gradients: dict[str, bytes]
    norm: bytes


class Model(nn.Module):
    """Shards of different sizes, a layer that odd ranks leave out, gradients that are -0.0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 37), nn.Linear(37, 37)
        self.last = nn.Linear(37, 5)
        self.unmoved = nn.Parameter(torch.ones(9))

    def forward(self, x: torch.Tensor, all_layers: bool) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x)) if all_layers else x
        return self.last(x).square().sum() + (self.unmoved * -0.0).sum()


def step(logical_ranks: int, replicas: int = 1, ordered: bool = True) -> Found:
    """Train one step on this process's share of the logical ranks."""
    torch.set_num_threads(1)
    processes = torch.distributed.get_world_size()
    shape, names = ((replicas, processes // replicas), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = Model()
    for layer in (model.first, model.last):
        fully_shard(layer, mesh=mesh if replicas > 1 else mesh["shard"])
    fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])
    share = logical_ranks // processes
    own = torch.distributed.get_rank() * share
    current = [own]
    if ordered:
        reduce_in_order(model, range(own, own + share), logical_ranks, lambda: current[0])
    for rank in range(own, own + share):
        current[0] = rank
        data = torch.randn(3, 7, generator=torch.Generator().manual_seed(rank))
        model(data, all_layers=rank % 2 == 0).backward()
    gradients = {name: bytes_of(weight.grad) for name, weight in model.named_parameters()}
    norm = clip_grad_norm_ if ordered else nn.utils.clip_grad_norm_
    return Found(gradients, bytes_of(norm(model.parameters(), 1e9)))


def bytes_of(tensor: Any) -> bytes:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().numpy().tobytes()


def alone(logical_ranks: int) -> Found:
    (found,) = job(1, step, logical_ranks)
    return found


@pytest.mark.parametrize("logical_ranks", [4, 6, 8])
def test_gradients_and_norm_are_equal_on_any_number_of_processes(logical_ranks: int) -> None:
    expected = alone(logical_ranks)
    for processes in (2, 4 if logical_ranks != 6 else 3):
        assert job(processes, step, logical_ranks) == [expected] * processes


def test_with_replicas_too() -> None:
    assert job(4, step, 8, 2) == [alone(8)] * 4


def test_the_reduction_of_fsdp2_depends_on_the_number_of_processes() -> None:
    """The control: this comparison can fail."""
    two, four = (job(processes, step, 8, 1, False)[0] for processes in (2, 4))
    # It averages over the processes.
    (a, b) = (
        processes * torch.frombuffer(bytearray(found.gradients["first.weight"]), dtype=torch.float)
        for processes, found in ((2, two), (4, four))
    )
    assert torch.allclose(a, b, rtol=1e-3)
    assert not torch.equal(a, b)


def in_another_order() -> str:
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(nn.Linear(4, 4), mesh=mesh)
    own = torch.distributed.get_rank() * 2
    reduce_in_order(model, range(own, own + 2), 4, lambda: own + 1)
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(1, 4)).sum().backward()
    return str(caught.value)


def test_logical_ranks_in_another_order_are_an_error() -> None:
    first, second = job(2, in_another_order)
    assert first.startswith("a gradient of logical rank 1, expected 0: run one backward for each")
    assert second.startswith("a gradient of logical rank 3, expected 2")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_a_tree_adds_pairs_whatever_the_order_of_its_leaves(size: int) -> None:
    values = [torch.rand(3) for _ in range(size)]
    totals = []
    for order in (range(size), range(size)[::-1]):
        tree = Tree(size)
        for leaf in order:
            tree.add((0, leaf), values[leaf].clone())
        (total,) = tree.sums.values()
        totals.append(total)
    assert torch.equal(*totals)
    assert torch.allclose(totals[0], torch.stack(values).sum(0))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 100])
def test_halving_adds_up_everything(length: int) -> None:
    x = torch.randint(0, 100, (2, length))
    assert torch.equal(halved(x), x.sum(-1))
