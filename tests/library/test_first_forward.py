"""A rewind at the first forward, on every kind of module that a training step calls."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nemo_rng_dcp import RNGStateWarning, ScopedRNG, StatefulRNG
from tests.support.jobs import job
from tests.support.streams import draw, unmoved, warned

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


@torch.no_grad()
def validate_without_gradients(model: nn.Module) -> None:
    model(torch.ones(1, 4))


@torch.inference_mode()
def sanity_check(model: nn.Module) -> None:
    model.eval()
    model(torch.ones(1, 4))
    model.train()


def validate_with_gradients(model: nn.Module) -> None:
    model.eval()
    model(torch.ones(1, 4))
    model.train()


def probe(model: nn.Module) -> None:
    """A training forward whose draws and streams are undone."""
    with ScopedRNG(seed=3):
        model(torch.ones(1, 4))


@pytest.mark.parametrize("create", [plain, compiled, with_activation_checkpoints])
@pytest.mark.parametrize(
    "before", [validate_without_gradients, sanity_check, validate_with_gradients, probe]
)
def test_what_comes_before_the_training_step_does_not_use_it_up(
    create: Callable[[], nn.Module], before: Callable[[nn.Module], None]
) -> None:
    rng, model = StatefulRNG(1), create()
    state = rng.state_dict()
    expected = step(model) + draw()
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(model)
    draw()
    before(model)
    assert step(model) + draw() == expected


@torch.no_grad()
def rollout(model: nn.Module) -> Numbers:
    numbers: Numbers = model(torch.ones(1, 4)).flatten().tolist()
    return numbers + draw()


def test_when_says_which_forward_counts() -> None:
    """A step that begins in evaluation, as reinforcement learning has it."""
    rng, model = StatefulRNG(1), Model()
    steps = 0
    state = rng.state_dict()
    expected = rollout(model)
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(model, when=lambda module: module is model and steps == 1)
    draw()
    assert rollout(model) != expected
    steps = 1
    assert rollout(model) == expected
    assert rollout(model) != expected


def test_a_rewind_in_between_is_enough() -> None:
    rng, model = StatefulRNG(1), Model()
    state = rng.state_dict()
    draw()
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(model)
    draw()
    rng.rewind()
    draw()  # what the step draws for its batch
    model.blocks = nn.ModuleList()  # which leaves a forward that draws nothing
    with unmoved():
        model(torch.ones(1, 4))


def test_several_calls_wait_for_one_forward() -> None:
    rng, models = StatefulRNG(1), [Model(), Model()]
    state = rng.state_dict()
    expected = step(models[1]) + step(models[0])
    rng.load_state_dict(state)
    for model in models:
        rng.rewind_at_first_forward(model)
    draw()
    assert step(models[1]) + step(models[0]) == expected
    assert not any(model._forward_pre_hooks for model in models)


def never_in_forward(model: nn.Module) -> None:
    """A step as ``training_step`` or ``generate`` has it: it calls the parts."""
    assert isinstance(model, Model)
    x = torch.ones(1, 4)
    for block in model.blocks:
        x = block(x)
    x.sum().backward()


@pytest.mark.parametrize("missed", [never_in_forward, sanity_check, probe])
def test_a_save_before_it_says_so_once_and_ends_it(missed: Callable[[nn.Module], None]) -> None:
    rng, model = StatefulRNG(1), Model()
    state = rng.state_dict()
    draw()
    rng.load_state_dict(state)
    rng.rewind_at_first_forward(model)
    rng.rewind_at_first_forward(nn.Linear(4, 4))
    draw()
    missed(model)
    [message] = warned(rng.state_dict)
    pattern = r"rank 0: .*no forward of Model or Linear has run in training.*call rewind\(\)"
    assert re.search(pattern, message)
    assert not model._forward_pre_hooks
    assert warned(rng.state_dict) == []
    before = draw()
    step(model)
    assert draw() != before


def missed_on_each_rank(path: str) -> list[str]:
    rng, model = StatefulRNG(1, ranked=True), Model()
    dcp.save({"rng": rng}, checkpoint_id=path)
    rng.rewind_at_first_forward(model)
    dcp.load({"rng": rng}, checkpoint_id=path)
    draw()
    if dist.get_rank() == 1:
        step(model)
    return warned(lambda: dcp.save({"rng": rng}, checkpoint_id=path))


def test_each_rank_speaks_for_itself(tmp_path: Path) -> None:
    [first, second] = job(2, missed_on_each_rank, str(tmp_path))
    assert [message.partition(":")[0] for message in first] == ["rank 0"]
    assert second == []


def test_as_an_error_it_is_said_again() -> None:
    rng, model = StatefulRNG(1), Model()
    rng.load_state_dict(rng.state_dict())
    rng.rewind_at_first_forward(model)
    draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RNGStateWarning)
        for _ in range(2):
            with pytest.raises(RNGStateWarning, match="no rewind follows"):
                rng.state_dict()


def test_saves_and_loads_without_a_missed_rewind_say_nothing(tmp_path: Path) -> None:
    rng, model = StatefulRNG(1), Model()

    def life() -> None:
        rng.rewind_at_first_forward(model)
        draw()
        dcp.save({"rng": rng}, checkpoint_id=tmp_path)  # nothing was loaded yet
        for _ in range(2):
            dcp.load({"rng": rng}, checkpoint_id=tmp_path)
            rng.state_dict()  # nothing has moved yet
            draw()  # then another load
        step(model)
        dcp.save({"rng": rng}, checkpoint_id=tmp_path)
        dcp.load({"rng": rng}, checkpoint_id=tmp_path)
        step(model)
        dcp.save({"rng": rng}, checkpoint_id=tmp_path)  # nobody had asked for a rewind

    assert warned(life) == []


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
