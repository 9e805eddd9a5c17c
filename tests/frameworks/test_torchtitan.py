"""torchtitan's CheckpointManager around an FSDP2 model."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from nemo_rng_dcp import StatefulRNG
from tests.frameworks.training import (
    AFTER,
    BATCH,
    BEFORE,
    RANKS,
    Plan,
    Run,
    Verdict,
    batch,
    net,
    run_page,
    train_step,
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


class OptimizerState:
    """An optimizer as torchtitan's own container presents it to DCP: by the parameters' names."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state)


class Batches(torch.utils.data.IterableDataset[torch.Tensor]):
    """The samples of a rank, without an end."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for step in count():
            yield from batch(step)


def loader_of_rank() -> Any:
    from torchtitan.components.dataloader import ParallelAwareDataloader

    return ParallelAwareDataloader(
        Batches(), dist.get_rank(), dist.get_world_size(), batch_size=BATCH
    )


def manager(
    folder: str,
    model: nn.Module,
    optimizer: OptimizerState | None = None,
    mode: str = "disabled",
    loader: Any = None,
) -> Any:
    from torchtitan.components.checkpointer import CheckpointManager

    config = CheckpointManager.Config(
        enable=True, interval=1, async_mode=mode, last_save_model_only=False
    )
    return CheckpointManager(
        config,
        dataloader=loader,
        model_parts=[model],
        optimizers=optimizer,
        lr_schedulers=None,
        states={},
        sd_adapter=None,
        base_folder=folder,
    )


def train(plan: Plan, mode: str = "disabled") -> Run:
    torch.manual_seed(42 + dist.get_rank())
    model = net()
    fully_shard(model.first)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = loader_of_rank()
    state = OptimizerState(model, optimizer)
    checkpointer = manager(str(plan.folder), model, state, mode, loader)
    names: dict[str, Any] = {"checkpointer": checkpointer, "step": BEFORE, "model_parts": [model]}
    if dist.get_world_size() != RANKS:
        checkpointer.exclude_from_loading.append("dataloader")
    if plan.ours:
        run_page("torchtitan", 0, names)
    if plan.resume:
        draw(plan.elsewhere)
        assert checkpointer.load(BEFORE)
        if plan.ours:
            run_page("torchtitan", 1, names)
    batches = iter(loader)  # as in its train(), after the load
    if not plan.resume:
        for _ in range(BEFORE):
            train_step(model, optimizer, next(batches))
        checkpointer.save(BEFORE)
        checkpointer.maybe_wait_for_staging()
    run = Run()
    for _ in range(AFTER):
        run.note(train_step(model, optimizer, next(batches)))
    checkpointer.close()
    return run


def train_with_async_saves(plan: Plan) -> Run:
    return train(plan, "async")


def test_checkpoint_manager(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("torchtitan", train)


def test_async_saves(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("torchtitan, async", train_with_async_saves)


def loaded_by_torchtitan(folder: str, resume: bool) -> tuple[list[float], str]:
    """Leave the load to torchtitan as well, which passes no planner."""
    rng = StatefulRNG(seed=42, ranked=True)
    checkpointer = manager(folder, fully_shard(net()))
    checkpointer.states["rng"] = rng
    if not resume:
        checkpointer.save(BEFORE)
        return draw(), ""
    draw()
    try:
        checkpointer.load(BEFORE)
    except CheckpointException as error:
        return [], str(error)
    return draw(), ""


def test_the_trap_of_another_number_of_ranks(tmp_path: Path) -> None:
    """The page says that the one line is exact on as many ranks, and an error on others."""
    expected = job(RANKS, loaded_by_torchtitan, str(tmp_path), False)
    assert job(RANKS, loaded_by_torchtitan, str(tmp_path), True) == expected
    for _, error in job(3, loaded_by_torchtitan, str(tmp_path), True):
        assert "Size mismatch" in error


def without_the_last_line(folder: str, resume: bool) -> tuple[list[list[float]], bool]:
    """Exclude the entry from torchtitan's load, and load it nowhere else."""
    checkpointer = manager(folder, fully_shard(net()))
    names: dict[str, Any] = {"checkpointer": checkpointer}
    run_page("torchtitan", 0, names)
    if resume:
        checkpointer.load(BEFORE)
    drawn = [draw(), draw()]
    if not resume:
        checkpointer.save(BEFORE)
    return drawn, names["rng"].loaded is None


def test_the_trap_of_excluding_without_loading(tmp_path: Path) -> None:
    """The page says that nothing is loaded, and where that shows."""
    started = job(RANKS, without_the_last_line, str(tmp_path), False)
    found = job(RANKS, without_the_last_line, str(tmp_path), True)
    # The streams are where the job started, not where it saved.
    assert found == [(drawn, True) for drawn, _ in started]
