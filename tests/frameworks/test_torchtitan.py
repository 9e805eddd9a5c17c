"""torchtitan's CheckpointManager around an FSDP2 model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from frameworks.training import AFTER, BEFORE, Plan, Run, Verdict, batch, net, run_page, train_step
from streams import draw

pytestmark = pytest.mark.frameworks


class OptimizerState:
    """An optimizer as torchtitan's own container presents it to DCP: by the parameters' names."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state)


def train(plan: Plan, mode: str = "disabled") -> Run:
    from torchtitan.components.checkpointer import CheckpointManager

    torch.manual_seed(42 + dist.get_rank())
    model = net()
    fully_shard(model.first)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpointer: Any = CheckpointManager(
        CheckpointManager.Config(
            enable=True, interval=1, async_mode=mode, last_save_model_only=False
        ),
        dataloader=None,
        model_parts=[model],
        optimizers=OptimizerState(model, optimizer),
        lr_schedulers=None,
        states={},
        sd_adapter=None,
        base_folder=str(plan.folder),
    )
    names = {"checkpointer": checkpointer, "step": BEFORE}
    if plan.ours:
        run_page("torchtitan", 0, names)
    if plan.resume:
        draw(plan.elsewhere)
        assert checkpointer.load(BEFORE)
        if plan.ours:
            run_page("torchtitan", 1, names)
    else:
        for step in range(BEFORE):
            train_step(model, optimizer, batch(step))
        checkpointer.save(BEFORE)
        checkpointer.maybe_wait_for_staging()
    run = Run()
    for step in range(BEFORE, BEFORE + AFTER):
        run.note(train_step(model, optimizer, batch(step)))
    checkpointer.close()
    return run


def train_with_async_saves(plan: Plan) -> Run:
    return train(plan, "async")


def test_checkpoint_manager(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("torchtitan", train)


def test_async_saves(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("torchtitan, async", train_with_async_saves)
