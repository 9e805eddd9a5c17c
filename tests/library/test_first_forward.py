"""A rewind at the first forward, on every kind of module that a training step calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nemo_rng_dcp import StatefulRNG
from tests.support.jobs import job
from tests.support.streams import draw, unmoved

Numbers = list[float]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.linear(x), 0.5)


class Model(nn.Module):
    """Two blocks with dropout, each inside an activation checkpoint if asked for."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def plain() -> nn.Module:
    return Model()


def with_activation_checkpoints() -> nn.Module:
    return Model(checkpointed=True)


def compiled() -> nn.Module:
    model: nn.Module = torch.compile(Model(), backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    return model


def compiled_in_place() -> nn.Module:
    model = Model()
    model.compile(backend="aot_eager", fullgraph=True)
    return model


class CompiledStep(nn.Module):
    """A model that a compiled function calls."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.step = torch.compile(lambda x: self.model(x) * 2, backend="aot_eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.step(x)
        return output


def with_compiled_blocks() -> nn.Module:
    model = Model(checkpointed=True)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


def ddp() -> nn.Module:
    return DistributedDataParallel(Model())


def fsdp2() -> nn.Module:
    model, mesh = Model(checkpointed=True), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module) -> Numbers:
    """Train a step and return what shows every draw in it: the output and the gradients."""
    model.zero_grad()
    output = model(torch.ones(1, 4))
    output.sum().backward()
    numbers: Numbers = output.flatten().tolist()
    for parameter in model.parameters():
        assert parameter.grad is not None
        numbers += (
            getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)().flatten().tolist()
        )
    return numbers


def resumed(create: Callable[[], nn.Module]) -> tuple[Numbers, Numbers]:
    """Train two steps; then load, draw as a fresh data iterator does, train the same two."""
    rng = StatefulRNG(42, ranked=True)
    torch.manual_seed(0)
    model = create()
    # Before the load, with a forward: nothing was loaded, so nothing happens.
    rng.rewind_at_first_forward(model.model if isinstance(model, CompiledStep) else model)
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    step(model)
    state = rng.state_dict()
    expected = step(model) + step(model) + draw()
    rng.load_state_dict(state)
    draw(3)
    return expected, step(model) + step(model) + draw()


@pytest.mark.parametrize(
    "create",
    [
        plain,
        with_activation_checkpoints,
        compiled,
        compiled_in_place,
        with_compiled_blocks,
        CompiledStep,
    ],
)
def test_a_resumed_step_is_exact(create: Callable[[], nn.Module]) -> None:
    expected, found = resumed(create)
    assert found == expected


@pytest.mark.parametrize("create", [ddp, fsdp2])
def test_a_resumed_step_is_exact_on_every_rank(create: Callable[[], nn.Module]) -> None:
    found = job(2, resumed, create)
    for expected, again in found:
        assert again == expected
    assert found[0] != found[1]


@pytest.mark.parametrize("several", [list, nn.ModuleList])
def test_the_part_that_runs_first_rewinds_and_the_others_do_not(several: Any) -> None:
    rng = StatefulRNG(1)
    parts = several([Block(), Block()])
    state = rng.state_dict()
    x = torch.ones(1, 4)
    expected = [parts[1](x).tolist(), parts[0](x).tolist(), draw()]
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(parts)
    draw(2)
    assert [parts[1](x).tolist(), parts[0](x).tolist(), draw()] == expected


def test_the_rewind_happens_once() -> None:
    rng = StatefulRNG(1)
    model = Model()
    state = rng.state_dict()
    draw()
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(model)
    draw()
    step(model)
    expected = draw()
    rng.load_state_dict(state)
    step(model)
    assert draw() == expected
    assert not model._forward_pre_hooks


def test_before_any_load_nothing_moves() -> None:
    rng = StatefulRNG(1)
    model = nn.Linear(4, 4)
    rng.rewind_at_first_forward(model)
    draw()
    with unmoved():
        model(torch.ones(1, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_inside_an_activation_checkpoint_is_refused(reentrant: bool) -> None:
    rng = StatefulRNG(1)
    model = Model()
    state = rng.state_dict()
    draw()
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(model)
    draw()
    x = torch.ones(1, 4, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"forward of Model .* activation checkpoint.*rewind\(\)"
    ):
        checkpoint(model, x, use_reentrant=reentrant)


def test_only_modules_are_taken() -> None:
    models = {
        "str": ["model"],
        "list": [],
        "ModuleDict": nn.ModuleDict({"part": Model()}),
        "ParameterList": [Model(), nn.ParameterList()],
    }
    for name, model in models.items():
        with pytest.raises(TypeError, match=f"found a {name}, expected a torch module with a forw"):
            StatefulRNG(1).rewind_at_first_forward(model)  # type: ignore[arg-type]


def test_what_a_hook_draws_is_part_of_the_forward() -> None:
    rng = StatefulRNG(1)
    model = Model()
    drawn: list[float] = []
    model.register_forward_pre_hook(lambda module, args: drawn.append(torch.rand(()).item()))
    state = rng.state_dict()
    step(model)
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(model)
    draw()
    step(model)
    assert drawn[0] == drawn[1]
