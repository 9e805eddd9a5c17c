"""The recipe's reduction: gradients and norms do not depend on the number of processes.

Each trap on the way there has a control, which has to differ or to be refused.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nemo_rng_dcp import ScopedRNG, StatefulRNG
from tests.support.jobs import job

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
sys.path.append(str(RECIPES))
from reduction import OrderedSum, Tree, WholeGradients, reduce_in_order  # noqa: E402
from shards import clip_grad_norm_, halved  # noqa: E402

LEAVES_OUT = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
"""Whether odd ranks leave a layer out: FSDP2 of an older torch, such as 2.9, cannot."""

REDUCES_EACH_USE = torch.__version__ >= "2.10"
"""Whether a layer that is used twice is reduced twice: torch 2.9 does so once, after both."""


class Case(NamedTuple):
    logical_ranks: int
    replicas: int = 1
    fault: str = ""


class Found(NamedTuple):
    """A step's gradients before clipping, and their norm, as bytes; also torch's own norm."""

    gradients: dict[str, bytes]
    norm: bytes
    torchs_norm: bytes


FSDP2, SIGNS, NO_HOOK = Case(8, 1, "fsdp2's own"), Case(4, 1, "-0.0"), Case(8, 1, "no hook")
CASES = {
    1: [Case(4), Case(6), Case(8), SIGNS, NO_HOOK],
    2: [Case(4), Case(6), Case(8), FSDP2, SIGNS],
    3: [Case(6)],
    4: [Case(4), Case(8), Case(8, replicas=2), FSDP2, SIGNS],
}
"""By number of processes."""


class Model(nn.Module):
    """Shards of different sizes, a layer that odd ranks leave out, gradients that are -0.0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 37), nn.Linear(37, 37)
        self.last = nn.Linear(37, 5)
        self.unmoved = nn.Parameter(torch.ones(9))

    def forward(self, x: torch.Tensor, all_layers: bool) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x)) if all_layers else x
        return self.last(x).square().sum() + (self.unmoved * -0.0).sum()


def sharded(mesh: DeviceMesh) -> nn.Module:
    with ScopedRNG(0):
        model = Model()
    for module in (model.first, model.last, model):
        fully_shard(module, mesh=mesh)
    return model


def backward(
    model: nn.Module, rng: StatefulRNG, after: Any = None, leaves_out: bool = LEAVES_OUT
) -> None:
    for rank in rng.ranks:
        with rng.as_rank(rank):
            model(torch.randn(3, 7), all_layers=rank % 2 == 0 or not leaves_out).backward()
            if after is not None:
                after()


def step(case: Case) -> Found:
    """Train one step on this process's share of the logical ranks."""
    processes = dist.get_world_size()
    mesh = init_device_mesh(
        "cpu",
        (case.replicas, processes // case.replicas),
        mesh_dim_names=("replicate", "shard"),
    )
    mesh = mesh if case.replicas > 1 else mesh["shard"]
    rng = StatefulRNG(0, ranked=True, logical_ranks=case.logical_ranks)
    model: Any = sharded(mesh)
    if case.fault == "fsdp2's own":
        if LEAVES_OUT:
            model.set_reduce_scatter_unused_params(True)
    elif case.fault == "no hook":
        for module, reduction in zip(
            (model, model.first, model.last), reduce_in_order(model, mesh, rng), strict=True
        ):
            module.set_all_reduce_hook(lambda gradient: None)
            module.set_custom_reduce_scatter(reduction)
    else:
        reduce_in_order(model, mesh, rng)
    with pytest.MonkeyPatch.context() as patch:
        if case.fault == "-0.0":
            add = torch.Tensor.add_
            patch.setattr(torch.Tensor, "add_", lambda a, b: a if type(b) is float else add(a, b))
        backward(model, rng)
    gradients = {name: bytes_of(weight.grad) for name, weight in model.named_parameters()}
    norm = clip_grad_norm_(model.parameters(), 1e9, mesh)
    torchs = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    return Found(gradients, bytes_of(norm), bytes_of(torchs))


def steps(cases: list[Case]) -> list[Found]:
    return [step(case) for case in cases]


def bytes_of(tensor: Any) -> bytes:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().numpy().tobytes()


Results = dict[tuple[int, Case], Found]


@pytest.fixture(scope="module")
def found() -> Results:
    """By number of processes and case; all ranks of a job agree."""
    results = {}
    for processes, cases in CASES.items():
        first, *others = job(processes, steps, cases)
        assert others == [first] * (processes - 1)
        results |= {(processes, case): one for case, one in zip(cases, first, strict=True)}
    return results


@pytest.mark.parametrize("logical_ranks", [4, 6, 8])
def test_gradients_and_norm_are_equal_on_any_number_of_processes(
    logical_ranks: int, found: Results
) -> None:
    expected, *others = (
        one[:2]
        for (_, case), one in found.items()
        if case.logical_ranks == logical_ranks and not case.fault
    )
    assert others == [expected] * {4: 2, 6: 2, 8: 3}[logical_ranks]


def test_the_reduction_of_fsdp2_depends_on_the_number_of_processes(found: Results) -> None:
    """It averages over the processes."""
    (a, b) = (
        processes * torch.frombuffer(bytearray(one.gradients["first.weight"]), dtype=torch.float)
        for (processes, case), one in found.items()
        if case == FSDP2
    )
    assert torch.allclose(a, b, rtol=1e-3)
    assert not torch.equal(a, b)


def test_torchs_own_norm_depends_on_the_number_of_processes(found: Results) -> None:
    for one in found.values():
        norms = (torch.frombuffer(bytearray(norm), dtype=torch.float) for norm in one[1:])
        torch.testing.assert_close(*norms)
    equal = [found[processes, Case(4)] for processes in (1, 2, 4)]
    assert len({one.norm for one in equal}) == 1
    assert len({one.torchs_norm for one in equal}) > 1


@pytest.mark.skipif(torch.__version__ < "2.10", reason="FSDP2 of torch 2.9 calls it")
def test_one_process_calls_no_reduce_scatter(found: Results) -> None:
    """Without the other hook its gradients are summed one after the other."""
    assert found[1, NO_HOOK].gradients != found[1, Case(8)].gradients


def test_the_sign_of_a_zero_depends_on_the_number_of_micro_batches(found: Results) -> None:
    """Unless 0.0 is added to each."""
    two, four = found[2, SIGNS].gradients, found[4, SIGNS].gradients
    assert [name for name in two if two[name] != four[name]] == ["unmoved"]


def refused() -> list[str]:
    """Return what is said of each use that would be wrong, on this rank of 2."""
    texts = []

    def note(use: Any) -> None:
        with pytest.raises((RuntimeError, ValueError)) as caught:
            use()
        texts.append(str(caught.value))

    mesh = init_device_mesh("cpu", (2,))
    rng = StatefulRNG(0, ranked=True, logical_ranks=4)

    def in_another_order() -> None:
        reduce_in_order(model := sharded(mesh), mesh, rng)
        with rng.as_rank(rng.ranks[1]):
            model(torch.randn(3, 7), all_layers=True).backward()

    def twice() -> None:
        """Rank after rank, the first layer in each."""
        model: Any = sharded(mesh)
        model.register_forward_pre_hook(lambda model, args: (model.first(args[0])[:, :7],))
        reduce_in_order(model, mesh, rng)
        backward(model, rng)

    def without_unused() -> None:
        model: Any = sharded(mesh)
        reduce_in_order(model, mesh, rng)
        if LEAVES_OUT:
            model.set_reduce_scatter_unused_params(False)
        backward(model, rng, leaves_out=True)

    def with_one_shard() -> None:
        replicas = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        reduce_in_order(sharded(replicas), replicas, rng)

    def ignored() -> None:
        model = Model()
        fully_shard(model, mesh=mesh, ignored_params={model.unmoved})
        reduce_in_order(model, mesh, rng)

    def on_another_mesh() -> None:
        root = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        reduce_in_order(sharded(root["dp"]), root["dp"], rng)

    def plain_ranks() -> None:
        reduce_in_order(sharded(mesh), mesh, StatefulRNG(0, ranked=True))

    def on_dim_1() -> None:
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
        weight.grad = weight.detach().clone()
        clip_grad_norm_([weight], 1.0, mesh)

    for use in (
        in_another_order,
        *[twice] * REDUCES_EACH_USE,
        without_unused,
        with_one_shard,
        ignored,
        on_another_mesh,
        plain_ranks,
        on_dim_1,
    ):
        note(use)
    return texts


def test_what_would_be_wrong_is_refused() -> None:
    for number, texts in enumerate(job(2, refused)):
        first = 2 * number
        expected = [
            f"a gradient of logical rank {first + 1}, expected {first}: run one backward for each",
            *[f"a gradient of logical rank {first}, expected {first + 1}"] * REDUCES_EACH_USE,
            "The size of tensor a",
            "with one shard, FSDP2 sums over the replicas before",
            "unmoved is in no FSDP module",
            "this process is number 0 of 1 in DeviceMesh((dp=1), ",
            "the order is that of logical ranks: StatefulRNG(logical_ranks=N)",
            "a gradient is (Shard(dim=1),), expected Shard(0)",
        ]
        beginnings = [text[: len(begin)] for text, begin in zip(texts, expected, strict=True)]
        assert beginnings == expected


def by_hand_and_as_a_hook() -> list[dict[str, bytes]]:
    """Return the gradients of a model that each process has whole, summed in two ways."""
    rng, found = StatefulRNG(0, ranked=True, logical_ranks=4), []
    start = {key: table.clone() for key, table in rng.state_dict().items()}
    sums: dict[int, OrderedSum] = {}

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations
        total = sums.setdefault(bucket.index(), OrderedSum(rng)).total(bucket.buffer())
        done: Any = torch.futures.Future()
        done.set_result(torch.zeros_like(bucket.buffer()) if total is None else total)
        return done

    for as_a_hook in (False, True):
        rng.load_state_dict(start)
        with ScopedRNG(0):
            model: Any = Model()
        weights, collect = dict(model.named_parameters()), None
        if as_a_hook:
            model = DistributedDataParallel(model, find_unused_parameters=True)
            model.register_comm_hook(None, hook)
        else:
            collect = WholeGradients(model, rng).collect
        backward(model, rng, collect)
        found.append({name: bytes_of(weight.grad) for name, weight in weights.items()})
    return found


@pytest.mark.skipif(not LEAVES_OUT, reason="FSDP2 of this torch needs every layer each time")
def test_a_hook_of_ddp_leaves_out_what_the_last_micro_batch_does_not_use(found: Results) -> None:
    for by_hand, hooked in job(2, by_hand_and_as_a_hook):
        assert by_hand == found[2, Case(4)].gradients
        wrong = [name for name in hooked if hooked[name] != by_hand[name]]
        assert wrong == ["second.weight", "second.bias"]


def adamw(pieces: list[int], **options: bool) -> torch.Tensor:
    """Return a weight after some steps, when it is cut into pieces."""
    with ScopedRNG(0):
        start, gradient = torch.randn(37), torch.randn(37)
    weights = [nn.Parameter(piece.clone()) for piece in start.split(pieces)]
    optimizer = torch.optim.AdamW(weights, lr=0.05, **options)
    for _ in range(10):
        for weight, piece in zip(weights, gradient.split(pieces), strict=True):
            weight.grad = piece.clone()
        optimizer.step()
    return torch.cat([weight.detach() for weight in weights])


def test_fused_optimizers_depend_on_the_shards() -> None:
    """The ends of a shard are computed in another way than the rest."""
    whole, cut = [37], [10, 10, 10, 7]
    for options in ({"foreach": True}, {"foreach": False}):
        assert torch.equal(adamw(whole, **options), adamw(cut, **options))
    assert not torch.equal(adamw(whole, fused=True), adamw(cut, fused=True))


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
