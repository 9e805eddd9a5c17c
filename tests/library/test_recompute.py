"""Activation checkpointing: the same gradients and streams as without it."""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
    set_checkpoint_early_stop,
)

from nemo_rng_dcp import ScopedRNG, StatefulRNG
from tests.support.jobs import job

Tensor = torch.Tensor
Run = Callable[..., Tensor]
Outcome = tuple[list[list[float]], dict[str, str]]


class Job:
    """Streams of every kind, a weight, and a block that draws from all of them."""

    def __init__(self, logical_ranks: int | None = None) -> None:
        self.own = torch.Generator().manual_seed(2)
        self.numpy = np.random.default_rng(3)
        self.python = random.Random(4)
        generators = {"own": self.own, "augment": self.numpy, "order": self.python}
        self.rng = StatefulRNG(1, ranked=True, generators=generators, logical_ranks=logical_ranks)
        self.weight = torch.rand(4, 4, requires_grad=True)
        self.failing = 0

    def block(self, x: Tensor) -> Tensor:
        # A gaussian each, so that what a generator keeps for its next draw matters, too.
        numbers = [random.gauss(0, 1), np.random.standard_normal(), self.numpy.standard_normal()]
        self.failing -= 1
        if self.failing == 0:
            raise OSError("a block that fails")
        x = torch.sin(x @ self.weight) * (sum(numbers) + self.python.gauss(0, 1))
        x = nn.functional.dropout(x, 0.5) * torch.rand(4, generator=self.own)
        # Behind the last tensor that is kept: the recomputation may stop before it.
        return x + random.random() + np.random.random() + torch.rand(4)

    def drawing_from_torch(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(torch.sin(x @ self.weight), 0.5) * torch.rand(4)

    def checkpointed(self, function: Run, *args: Tensor, **options: Any) -> Tensor:
        options = {"context_fn": self.rng.recompute, "use_reentrant": False, **options}
        output: Tensor = checkpoint(function, *args, **options)
        return output

    def selective(self, function: Run, *args: Tensor) -> Tensor:
        save = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        return self.checkpointed(
            function, *args, context_fn=functools.partial(self.rng.recompute, save)
        )

    def outcome(self) -> Outcome:
        assert self.weight.grad is not None
        return self.weight.grad.tolist(), self.rng.fingerprint()


X = torch.ones(3, 4)


def one(trial: Job, run: Run) -> None:
    run(trial.block, X).sum().backward()


def several(trial: Job, run: Run) -> None:
    x = X
    for _ in range(3):
        x = run(trial.block, x)
        torch.rand(1, generator=trial.own)
    x.sum().backward()
    run(trial.block, x.detach()).sum().backward()


def nested(trial: Job, run: Run) -> None:
    def two(x: Tensor) -> Tensor:
        return run(trial.block, run(trial.block, x) + trial.python.random())

    run(lambda x: run(two, x) * random.random(), X).sum().backward()


def interleaved(trial: Job, run: Run) -> None:
    first, second = run(trial.block, X), run(trial.block, X)
    first.sum().backward()
    third = run(trial.block, second)
    trial.numpy.random()
    run(trial.block, X).sum().backward()
    third.sum().backward()


def backward_twice(trial: Job, run: Run) -> None:
    output = run(trial.block, X)
    output.sum().backward(retain_graph=True)
    random.random()
    output.sum().backward()


def in_evaluation(trial: Job, run: Run) -> None:
    with torch.no_grad():
        run(trial.block, X)
    run(trial.block, X).sum().backward()


def in_a_scope(trial: Job, run: Run) -> None:
    with ScopedRNG(5):
        first, second = run(trial.block, X), run(trial.block, X)
        second.sum().backward()
    first.sum().backward()


STEPS = [one, several, nested, interleaved, backward_twice, in_evaluation, in_a_scope]


def plainly(function: Run, *args: Tensor) -> Tensor:
    return function(*args)


def outcomes(
    step: Callable[[Job, Run], None], run: Callable[..., Tensor] = Job.checkpointed, **options: Any
) -> tuple[Outcome, Outcome]:
    """Return what a step gives without checkpointing and with it."""
    plain = Job()
    step(plain, plainly)
    expected = plain.outcome()
    trial = Job()
    step(trial, functools.partial(run, trial, **options))
    return expected, trial.outcome()


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_gradients_and_streams_are_those_without_checkpointing(
    step: Callable[[Job, Run], None], early_stop: bool, preserve: bool
) -> None:
    with set_checkpoint_early_stop(early_stop):
        expected, found = outcomes(step, preserve_rng_state=preserve)
    assert found == expected


@pytest.mark.parametrize("step", [one, several, nested, interleaved])
def test_selective_checkpoints_are_exact_too(step: Callable[[Job, Run], None]) -> None:
    expected, found = outcomes(step, Job.selective)
    assert found == expected


def test_a_wrapper_passes_it_on() -> None:
    def wrapped(trial: Job, run: Run) -> None:
        block = nn.Identity()
        block.forward = trial.block  # type: ignore[method-assign]
        if run is not plainly:
            block = checkpoint_wrapper(block, context_fn=trial.rng.recompute)
        block(X).sum().backward()

    expected, found = outcomes(wrapped)
    assert found == expected


def test_torch_alone_gives_other_gradients_and_moves_the_streams() -> None:
    # Should this fail, torch has learned it.
    expected, found = outcomes(one, context_fn=noop_context_fn)
    assert found[0] != expected[0]
    moved = {name for name, stream in found[1].items() if stream != expected[1][name]}
    assert moved == {"python", "numpy", "own", "augment", "order"}


def test_other_contexts_are_entered_within() -> None:
    trial, seen = Job(), []

    @contextmanager
    def noting(what: str) -> Iterator[None]:
        seen.append((what, trial.rng.fingerprint()))
        try:
            yield
        finally:
            seen.append((what, "left"))

    both = functools.partial(
        trial.rng.recompute, lambda: (noting("forward"), noting("recomputation"))
    )
    before = trial.rng.fingerprint()
    trial.checkpointed(trial.block, X, context_fn=both).sum().backward()
    assert seen == [
        ("forward", before),
        ("forward", "left"),
        ("recomputation", before),
        ("recomputation", "left"),
    ]


class Refusing(AbstractContextManager[None]):
    def __enter__(self) -> None:
        random.random()
        raise OSError("a context that fails")

    def __exit__(self, *error: object) -> None: ...


def test_what_torch_2_9_traces_is_part_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks a function of its own whether it does."""

    def is_compiling(*asked: object) -> bool:
        return asked == (None, (), {})

    recompute, given = StatefulRNG(1).recompute, (nullcontext(), nullcontext())
    monkeypatch.delattr(torch.utils.checkpoint, "_is_compiling", raising=False)
    assert not any(isinstance(context, TorchDispatchMode) for context in recompute())
    monkeypatch.setattr(torch.utils.checkpoint, "_is_compiling", is_compiling, raising=False)
    assert all(isinstance(context, TorchDispatchMode) for context in recompute())
    assert recompute(lambda: given) is given


def test_a_context_that_fails_leaves_the_streams_alone() -> None:
    trial = Job()
    failing = functools.partial(trial.rng.recompute, lambda: (nullcontext(), Refusing()))
    output = trial.checkpointed(trial.block, X, context_fn=failing)
    before = trial.rng.fingerprint()
    with pytest.raises(OSError, match="a context that fails"):
        output.sum().backward()
    assert trial.rng.fingerprint() == before


class Told(AbstractContextManager[None]):
    def __exit__(self, *error: object) -> None:
        self.of = error


def test_the_contexts_inside_are_told_of_an_error() -> None:
    inside = Told(), Told()
    error = OSError("a block that fails")
    for context in StatefulRNG(1).recompute(lambda: inside):
        with pytest.raises(OSError, match="a block that fails"), context:
            raise error
    for told in inside:
        kind, value, traceback = told.of
        assert (kind, value) == (OSError, error)
        assert traceback is not None


def test_a_failing_recomputation_puts_the_streams_back() -> None:
    trial = Job()
    output = trial.checkpointed(trial.block, X)
    before = trial.rng.fingerprint()
    trial.failing = 1
    with pytest.raises(OSError, match="a block that fails"):
        output.sum().backward()
    assert trial.rng.fingerprint() == before


def test_a_failing_forward_leaves_the_streams_as_without_checkpointing() -> None:
    def fail(trial: Job, run: Run) -> None:
        trial.failing = 2
        output = run(trial.block, X)
        with pytest.raises(OSError, match="a block that fails"):
            run(trial.block, X)
        output.sum().backward()

    expected, found = outcomes(fail)
    assert found == expected


def whole_step(run: Run, x: Tensor, trial: Job) -> Tensor:
    for _ in range(2):
        x = run(trial.drawing_from_torch, x)
    return x * torch.rand(4)


@pytest.mark.parametrize("run", [Job.checkpointed, Job.selective])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_around_a_checkpoint_compiled_code_is_exact(backend: str, run: Any) -> None:
    def compiled(trial: Job, run: Run) -> None:
        step = torch.compile(lambda x: whole_step(run, x, trial), backend=backend, fullgraph=True)
        for _ in range(2):
            step(X).sum().backward()

    torch.compiler.reset()
    expected, found = outcomes(compiled, run)
    assert found == expected


def kept_tensors(run: Callable[..., Tensor]) -> int:
    """Return how many tensors a compiled step keeps for its backward."""
    torch.compiler.reset()
    trial, kept = Job(), 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return tensor

    def step(x: Tensor) -> Tensor:
        return whole_step(functools.partial(run, trial), x, trial)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.compile(step, backend="aot_eager")(X).sum().backward()
    return kept


def test_compiled_code_keeps_what_it_keeps_with_torch_alone() -> None:
    save = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    alone = kept_tensors(lambda _, f, x: checkpoint(f, x, use_reentrant=False))
    selective = kept_tensors(lambda _, f, x: checkpoint(f, x, use_reentrant=False, context_fn=save))
    assert alone < selective < kept_tensors(lambda _, f, x: f(x))
    assert kept_tensors(Job.checkpointed) == alone
    assert kept_tensors(Job.selective) == selective


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("step", [one, nested])
def test_with_compiled_code_inside_a_checkpoint_it_is_exact(
    step: Callable[[Job, Run], None],
) -> None:
    def with_compiled_blocks(trial: Job, run: Run) -> None:
        # With breaks in the graph, where NumPy and generators draw.
        trial.block = torch.compile(trial.block, backend="aot_eager")  # type: ignore[method-assign]
        step(trial, run)

    torch.compiler.reset()
    expected, found = outcomes(with_compiled_blocks)
    assert found == expected


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_code_that_cannot_be_compiled_whole_is_exact() -> None:
    def compiled(trial: Job, run: Run) -> None:
        step = torch.compile(lambda x: run(trial.block, x) * 2, backend="aot_eager")
        step(X).sum().backward()

    torch.compiler.reset()
    expected, found = outcomes(compiled)
    assert found == expected


def together(trial: Job, run: Run) -> None:
    """All forwards, each on its rank's streams, and one backward outside of them."""
    outputs = []
    for rank in trial.rng.ranks:
        with trial.rng.as_rank(rank):
            outputs.append(run(trial.block, X))
    torch.stack(outputs).sum().backward()


def compiled_around(trial: Job, run: Run) -> None:
    step = torch.compile(lambda x: whole_step(run, x, trial), backend="aot_eager", fullgraph=True)
    step(X).sum().backward()


def compiled_within(trial: Job, run: Run) -> None:
    # Without Python's numbers: new ones compile it anew, also between a forward and its backward.
    block = torch.compile(trial.drawing_from_torch, backend="aot_eager", fullgraph=True)
    run(lambda x: run(block, x) * random.random(), X).sum().backward()


@pytest.mark.filterwarnings("ignore:rank 0. .* drawn from outside of as_rank")
@pytest.mark.parametrize("step", [*STEPS, together, compiled_around, compiled_within])
def test_each_logical_rank_recomputes_with_its_own_streams(
    step: Callable[[Job, Run], None],
) -> None:
    def trained(run: Callable[..., Tensor]) -> Any:
        torch.compiler.reset()
        trial = Job(logical_ranks=2)
        if step is together:
            step(trial, functools.partial(run, trial))
        else:
            for rank in reversed(trial.rng.ranks):
                with trial.rng.as_rank(rank):
                    step(trial, functools.partial(run, trial))
        streams = []
        for rank in trial.rng.ranks:
            with trial.rng.as_rank(rank):
                streams.append(trial.rng.fingerprint())
        return trial.outcome()[0], streams

    expected = trained(lambda trial, function, *args: function(*args))
    assert trained(Job.checkpointed) == expected
    assert expected[1][0] != expected[1][1]


class Noise(nn.Module):
    """A linear layer, dropout and noise from every kind of generator."""

    def __init__(self, rng: StatefulRNG, generator: torch.Generator, checkpointed: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.rng, self.generator, self.checkpointed = rng, generator, checkpointed

    def noisy(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.linear(x), 0.5) * torch.rand(4, generator=self.generator)
        return torch.sin(x) * (random.gauss(0, 1) + np.random.standard_normal()) + random.random()

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.noisy(x)
        output: Tensor = checkpoint(
            self.noisy, x, use_reentrant=False, context_fn=self.rng.recompute
        )
        return output


def ddp(blocks: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(blocks)


def fsdp2(blocks: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(blocks, mesh=mesh)


def train(wrap: Callable[[nn.Sequential], nn.Module], checkpointed: bool) -> Any:
    generator = torch.Generator().manual_seed(dist.get_rank())
    rng = StatefulRNG(42, ranked=True, generators={"own": generator})
    with ScopedRNG(0):
        model = wrap(nn.Sequential(*(Noise(rng, generator, checkpointed) for _ in range(2))))
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
    gradients = [
        getattr(p.grad, "full_tensor", lambda p=p: p.grad)().tolist() for p in model.parameters()
    ]
    return gradients, rng.fingerprint()


def both(wrap: Callable[[nn.Sequential], nn.Module]) -> tuple[Any, Any]:
    return train(wrap, False), train(wrap, True)


@pytest.mark.parametrize("wrap", [ddp, fsdp2])
def test_it_is_exact_on_every_rank(wrap: Callable[[nn.Sequential], nn.Module]) -> None:
    found = job(2, both, wrap)
    for expected, checkpointed in found:
        assert checkpointed == expected
    assert found[0][0][1] != found[1][0][1]
