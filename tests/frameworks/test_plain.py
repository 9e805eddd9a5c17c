"""No framework but DCP: DDP and HSDP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from tests.frameworks.training import (
    AFTER,
    BEFORE,
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


# Without it FSDP1's param_groups are on rank 0 alone, and DCP misses those of the others.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class App:
    """Model and optimizer as PyTorch's own tutorial presents them to DCP."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=OPTIONS)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=OPTIONS,
        )


def train(plan: Plan, parallel: Callable[[nn.Module], nn.Module]) -> Run:
    torch.manual_seed(42 + dist.get_rank())
    model = parallel(net())
    app = App(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    names: dict[str, Any] = {"dcp": dcp, "app": app, "path": plan.folder}
    if plan.ours:
        run_page("plain", 0, names)
    if plan.resume:
        draw(plan.elsewhere)
        if plan.ours:
            run_page("plain", 2, names)
        else:
            dcp.load({"app": app}, checkpoint_id=plan.folder)
    else:
        for step in range(BEFORE):
            train_step(model, app.optimizer, batch(step))
        if plan.ours:
            run_page("plain", 1, names)
        else:
            dcp.save({"app": app}, checkpoint_id=plan.folder)
    run = Run()
    for step in range(BEFORE, BEFORE + AFTER):
        run.note(train_step(model, app.optimizer, batch(step)))
    return run


def hsdp(model: nn.Module) -> nn.Module:
    # One rank a shard group: what is tried is the mesh, on as few ranks as there are.
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard")
    )
    return fully_shard(model, mesh=mesh)


def train_with_ddp(plan: Plan) -> Run:
    return train(plan, DistributedDataParallel)


def train_with_hsdp(plan: Plan) -> Run:
    return train(plan, hsdp)


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def train_with_fsdp1(plan: Plan) -> Run:
    return train(plan, fsdp1)


@pytest.mark.filterwarnings("ignore")
def test_fsdp1(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("plain FSDP1", train_with_fsdp1)


def test_ddp(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("plain DDP", train_with_ddp)


def test_hsdp(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("plain HSDP", train_with_hsdp)


def tensor_parallel(path: str, resume: bool, with_mesh: bool) -> list[float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rng = StatefulRNG(seed=42, ranked=True, mesh=mesh["dp"] if with_mesh else None)
    if resume:
        draw()
        dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
    else:
        dcp.save({"rng": rng}, checkpoint_id=path)
    return draw()


@pytest.mark.parametrize("with_mesh", [True, False])
def test_the_trap_of_ranks_that_work_on_one_batch(with_mesh: bool, tmp_path: Path) -> None:
    """The page says that tensor-parallel ranks draw alike with the mesh that it names."""
    found = job(4, tensor_parallel, str(tmp_path), False, with_mesh)
    assert (found[0] == found[1], found[2] == found[3]) == (with_mesh, with_mesh)
    assert found[0] != found[2]
    assert job(4, tensor_parallel, str(tmp_path), True, with_mesh) == found
