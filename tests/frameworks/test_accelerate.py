"""Accelerate's save_state and load_state, with DDP and FSDP2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader

from nemo_rng_dcp import RNGStateError, StatefulRNG
from tests.frameworks.training import (
    AFTER,
    BATCH,
    BEFORE,
    RANKS,
    Plan,
    Run,
    Verdict,
    assert_import_continues,
    data,
    distinct,
    net,
    run_page,
    train_step,
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


class Augmented(torch.utils.data.Dataset[torch.Tensor]):
    """Adds noise from torch's global stream, in the main process."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return len(data())

    def __getitem__(self, index: int) -> torch.Tensor:
        return data()[index] + self.noise * torch.randn(4)


def train(plan: Plan, fsdp: bool = False, data_seed: int | None = 7, noise: float = 0.1) -> Run:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import set_seed

    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=data_seed)
    accelerator = Accelerator(cpu=True, dataloader_config=loading)
    if fsdp:
        use_fsdp2(accelerator)
    path = str(plan.folder)
    if not plan.ours:
        set_seed(42, device_specific=True)
    model: Any = net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader: Any = DataLoader(Augmented(noise), batch_size=BATCH, shuffle=True)
    names = {"accelerator": accelerator, "path": path, "dcp": dcp}
    names |= {"model": model, "optimizer": optimizer, "loader": loader}
    if plan.ours:
        run_page("accelerate", 0, names)
        run_page("accelerate", 1, names)
        model, optimizer, loader = names["model"], names["optimizer"], names["loader"]
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(loader)
    if plan.resume:
        draw(plan.elsewhere)
        if plan.ours:
            run_page("accelerate", 3 if dist.get_world_size() == RANKS else 4, names)
            batches = iter(loader)
        else:
            accelerator.load_state(path)
            batches = iter(accelerator.skip_first_batches(loader, BEFORE))
    else:
        for _ in range(BEFORE):
            train_step(model, optimizer, next(batches))
        if plan.ours:
            run_page("accelerate", 2, names)
        else:
            accelerator.save_state(path)
    run = Run()
    for _ in range(AFTER):
        x = next(batches)
        run.samples += x[:, 0].tolist()
        run.note(train_step(model, optimizer, x))
    return run


def use_fsdp2(accelerator: Any) -> None:
    """Shard with FSDP2, which Accelerate does not take a plugin for on the CPU."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    # Every AcceleratorState takes its values from there.
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )


def test_ddp(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("Accelerate, DDP", train)


def train_with_fsdp2(plan: Plan) -> Run:
    return train(plan, fsdp=True)


def test_fsdp2(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("Accelerate, FSDP2", train_with_fsdp2)


def test_the_trap_of_the_data_seed(tmp_path: Path) -> None:
    """The page says that ranks see each other's samples unless data_seed is set."""
    plan = Plan(tmp_path, resume=False, ours=True)
    seen, of = distinct(job(RANKS, train, plan, False, 7, 0.0))
    assert seen == of == RANKS * BATCH * AFTER
    seen, of = distinct(job(RANKS, train, plan, False, None, 0.0))
    assert seen < of


def registered(path: str, resume: bool) -> tuple[list[float], str]:
    """Register the object for checkpointing, which pickles rank 0's row alone."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rng = StatefulRNG(seed=42, ranked=True)
    accelerator.register_for_checkpointing(rng)
    if not resume:
        accelerator.save_state(path)
        return draw(), ""
    try:
        accelerator.load_state(path)
    except RNGStateError as error:
        return [], str(error)
    return draw(), ""


def test_the_trap_of_register_for_checkpointing(tmp_path: Path) -> None:
    """The page says that rank 1 raises at the resume, and what to do instead."""
    expected = job(RANKS, registered, str(tmp_path), False)
    found = job(RANKS, registered, str(tmp_path), True)
    assert found[0] == expected[0]
    assert "StatefulRNG.save()" in found[1][1]


def save_by_itself(path: str) -> list[float]:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=True)
    set_seed(42, device_specific=True)
    draw()
    accelerator.save_state(path)
    return draw()


def test_import_reads_its_files(tmp_path: Path) -> None:
    assert_import_continues(save_by_itself, tmp_path)
