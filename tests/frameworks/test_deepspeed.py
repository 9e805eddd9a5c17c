"""DeepSpeed's engine, without ZeRO and with it, on the CPU."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_rng_dcp import StatefulRNG, init_all_rng
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
)
from tests.support.jobs import JobError, job
from tests.support.streams import draw

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


def engine_of(stage: int) -> Any:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    # A kernel that it would compile, for all-reduces within a machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = net()
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        config=config,
        dist_init_required=False,
    )
    return engine


def train_step(engine: Any, step: int) -> torch.Tensor:
    loss: torch.Tensor = engine(batch(step)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.detach()


def train(plan: Plan, stage: int = 0) -> Run:
    engine = engine_of(stage)
    init_all_rng(42, ranked=True)
    path, tag = str(plan.folder), f"step-{BEFORE}"
    names = {"engine": engine, "path": path, "tag": tag, "client_state": {}}
    if plan.ours:
        run_page("deepspeed", 0, names)
    if plan.resume:
        draw(plan.elsewhere)
        if plan.ours:
            run_page("deepspeed", 2, names)
        else:
            engine.load_checkpoint(path)
    else:
        for step in range(BEFORE):
            train_step(engine, step)
        if plan.ours:
            run_page("deepspeed", 1, names)
        else:
            engine.save_checkpoint(path, tag=tag)
    run = Run()
    for step in range(BEFORE, BEFORE + AFTER):
        run.note(train_step(engine, step))
    return run


def test_without_zero(assert_adopted: Callable[..., Verdict]) -> None:
    own = assert_adopted("DeepSpeed", train)
    assert own.same == "ranks 0, 1 not restored"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage: int, tmp_path: Path) -> None:
    """The page says that it resumes on the same number of ranks, and not on another."""
    expected = job(RANKS, train, Plan(tmp_path, resume=False, ours=True), stage)
    found = job(RANKS, train, Plan(tmp_path, resume=True, ours=True, elsewhere=1), stage)
    assert found == expected
    with pytest.raises(JobError, match="DP world size of 2 but the current world size is 1"):
        job(1, train, Plan(tmp_path, resume=True, ours=True), stage)


def in_the_client_state(path: Path, resume: bool) -> str:
    engine = engine_of(0)
    rng = StatefulRNG(seed=42, ranked=True)
    if not resume:
        engine.save_checkpoint(str(path), client_state={"rng": rng.state_dict()})
        return ""
    with pytest.raises(RuntimeError) as caught:
        engine.load_checkpoint(str(path))
    return str(caught.value)


def test_the_trap_of_the_client_state(tmp_path: Path) -> None:
    """The page says that DeepSpeed cannot load it."""
    job(RANKS, in_the_client_state, tmp_path, False)
    for error in job(RANKS, in_the_client_state, tmp_path, True):
        assert "map_location" in error


def tracked() -> bool:
    from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.set_states({"model-parallel-rng": torch.Generator().manual_seed(3).get_state()})
    names: dict[str, Any] = {}
    run_page("deepspeed", 3, names)
    saved = names["rng"].state_dict()
    before = tracker.get_states()["model-parallel-rng"].clone()
    tracker.set_states({"model-parallel-rng": torch.Generator().manual_seed(4).get_state()})
    names["rng"].load_state_dict(saved)
    return torch.equal(tracker.get_states()["model-parallel-rng"], before)


def test_its_tracker_joins() -> None:
    assert job(1, tracked) == [True]
