"""Lightning Fabric's save and load with its ModelParallelStrategy, which is FSDP2."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.frameworks.training import (
    AFTER,
    BEFORE,
    Plan,
    Run,
    Verdict,
    batch,
    data,
    net,
    run_page,
    train_step,
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh["data_parallel"])


def set_up() -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    # The ranks exist already, as under torchrun.
    os.environ.update(TORCHELASTIC_RUN_ID="job", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    size = dist.get_world_size()
    strategy = ModelParallelStrategy(shard, data_parallel_size=size, tensor_parallel_size=1)
    fabric: Any = Fabric(accelerator="cpu", strategy=strategy, devices=size)
    fabric.launch()
    torch.manual_seed(42 + dist.get_rank())
    model: Any = fabric.setup_module(net(), move_to_device=False)
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    return fabric, model, optimizer


def train(plan: Plan) -> Run:
    fabric, model, optimizer = set_up()
    state = {"model": model, "optimizer": optimizer}
    names = {"fabric": fabric, "state": state, "path": str(plan.folder)}
    if plan.ours:
        run_page("fabric", 0, names)
    if plan.resume:
        draw(plan.elsewhere)
        if plan.ours:
            run_page("fabric", 2, names)
        else:
            fabric.load(str(plan.folder), state)
    else:
        for step in range(BEFORE):
            train_step(model, optimizer, batch(step))
        if plan.ours:
            run_page("fabric", 1, names)
        else:
            fabric.save(str(plan.folder), state)
    run = Run()
    for step in range(BEFORE, BEFORE + AFTER):
        run.note(train_step(model, optimizer, batch(step)))
    return run


def test_model_parallel_strategy(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("Lightning Fabric", train)


def train_over_a_loader(folder: str, resume: bool) -> list[Any]:
    """Train two epochs, or what is behind the checkpoint in the middle of the first one."""
    fabric, model, optimizer = set_up()
    size, rank = dist.get_world_size(), dist.get_rank()
    sampler: Any = DistributedSampler(range(48), size, rank)  # type: ignore[arg-type]
    loader = DataLoader(data(), 4, sampler=sampler)  # type: ignore[arg-type]
    names = {"fabric": fabric, "path": folder, "loader": loader, "dcp": dcp}
    run_page("fabric", 0, names)
    run_page("fabric", 3, names)
    state, loader = {"model": model, "optimizer": optimizer}, names["loader"]
    if resume:
        fabric.load(folder, state)
        run_page("fabric", 5, names)
        draw(rank)
    steps = []
    for epoch in loader.epochs(2):
        for samples in loader:
            loss = train_step(model, optimizer, fabric.to_device(samples))
            steps.append((epoch, samples.tolist(), loss.item(), draw()))
            if (epoch, loader.batches, resume) == (0, 2, False):
                fabric.save(folder, state)
                run_page("fabric", 4, names)
                steps.clear()
    return steps


def test_in_the_middle_of_an_epoch_a_resumable_loader_goes_on(tmp_path: Any) -> None:
    folder = str(tmp_path / "checkpoint")
    expected = job(2, train_over_a_loader, folder, False)
    assert len(expected[0]) == 2 * 6 - 2
    assert job(2, train_over_a_loader, folder, True) == expected


def an_entry_of_its_state(folder: str) -> tuple[bool, str]:
    from nemo_rng_dcp import StatefulRNG

    fabric, model, _ = set_up()
    rng = StatefulRNG(seed=42, ranked=True)
    state = {"model": model, "rng": rng}
    fabric.save(folder, state)
    expected = draw()
    fabric.load(folder, state)
    return draw() == expected, type(state["rng"]).__name__


def test_the_trap_of_an_entry_in_its_state(tmp_path: Any) -> None:
    """The page says that it restores nothing and puts a dict in the object's place."""
    found = job(2, an_entry_of_its_state, str(tmp_path / "checkpoint"))
    assert found == [(False, "dict")] * 2
