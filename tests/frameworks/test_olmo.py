"""OLMo-core's Trainer with its transformer on FSDP2, its data loader and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nemo_rng_dcp import RNGStateError
from tests.frameworks.training import AFTER, BEFORE, RANKS, Plan, Run, Verdict, run_page
from tests.support.jobs import job
from tests.support.streams import draw, states

pytestmark = pytest.mark.frameworks

LENGTH = 8
"""Of a sequence. A rank has one in each batch."""


def build(plan: Plan, steps_in_epoch: int) -> tuple[Any, Any, Any]:
    """Return a trainer's configuration, without callbacks, and what it is to train."""
    from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train import Duration, TrainerConfig
    from olmo_core.train.callbacks import CheckpointerCallback
    from olmo_core.train.train_module import (
        TransformerDataParallelConfig,
        TransformerTrainModuleConfig,
    )
    from olmo_core.utils import seed_all

    os.environ["OLMO_SHARED_FS"] = "1"  # the ranks share a folder
    seed_all(42)
    model = TransformerConfig.llama_like(
        d_model=16, vocab_size=32, n_layers=1, n_heads=2, hidden_size_multiple_of=8
    )
    model.block.dropout = 0.2
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH,
        max_sequence_length=LENGTH,
        optim=AdamWConfig(lr=0.01),
        dp_config=TransformerDataParallelConfig(name=DataParallelType.fsdp),
    ).build(model.build(init_device="meta"))
    plan.folder.mkdir(exist_ok=True)
    tokens, work = plan.folder / "tokens.npy", str(plan.folder / "work")
    if dist.get_rank() == 0 and not plan.resume:
        (np.arange(LENGTH * RANKS * steps_in_epoch) % 31).astype(np.uint8).tofile(tokens)
    dist.barrier()
    dataset = NumpyFSLDatasetConfig(
        paths=[str(tokens)],
        sequence_length=LENGTH,
        tokenizer=TokenizerConfig(vocab_size=32, eos_token_id=0, pad_token_id=0),
        work_dir=work,
    ).build()
    loader = NumpyDataLoaderConfig(
        global_batch_size=dist.get_world_size() * LENGTH, seed=1, num_threads=0, work_dir=work
    ).build(dataset, dp_process_group=module.dp_process_group)
    saves = CheckpointerCallback(
        save_interval=None,
        fixed_steps=[BEFORE],
        pre_train_checkpoint=False,
        enabled=not plan.resume,
    )
    run = plan.folder / "run"
    config = TrainerConfig(
        save_folder=str(plan.folder / "resumed" if plan.resume else run),
        load_path=str(run / f"step{BEFORE}") if plan.resume else None,
        save_overwrite=True,
        max_duration=Duration.steps(BEFORE + AFTER),
        callbacks={"saves": saves},
    )
    return config, module, loader


def train(plan: Plan, steps_in_epoch: int = 4 * (BEFORE + AFTER)) -> Run:
    from olmo_core.train.callbacks import Callback
    from olmo_core.train.common import TRAIN_CE_LOSS_METRIC

    run = Run()

    class Notes(Callback):  # type: ignore[misc]
        def post_train_batch(self) -> None:
            if self.step > BEFORE:
                run.note(self.trainer.get_metric(TRAIN_CE_LOSS_METRIC))

    config, module, loader = build(plan, steps_in_epoch)
    config.callbacks["notes"] = Notes()
    names: dict[str, Any] = {"trainer_config": config}
    if plan.ours:
        run_page("olmo", 0, names)
    draw(plan.elsewhere)
    fit(names["trainer_config"].build(module, loader))
    return run


def fit(trainer: Any) -> None:
    # It reduces metrics over the ranks, and an asynchronous save adds one when it is complete: at
    # another step on each rank, and then the reduction can hang.
    trainer._log_metrics = lambda: None
    trainer.fit()


def test_trainer(assert_adopted: Callable[..., Verdict]) -> None:
    own = assert_adopted("OLMo-core", train)
    assert own.same == "ranks 0, 1 differ (torch)"


def test_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    expected = job(RANKS, train, Plan(tmp_path, resume=False, ours=True), BEFORE)
    assert job(RANKS, train, Plan(tmp_path, True, True, elsewhere=1), BEFORE) == expected


def first_step(folder: Path) -> tuple[list[list[str]], bool, str]:
    """Return what the dry run and then the iterator move, and whether the dry run trains.

    And what a load without OLMo-core's reader says.
    """
    from olmo_core.train.callbacks import Callback

    moments: list[dict[str, bytes]] = []
    forwards: list[bool] = []

    class Notes(Callback):  # type: ignore[misc]
        def pre_train(self) -> None:
            self.pre_epoch()
            self.trainer.train_module.model.register_forward_pre_hook(
                lambda model, _: forwards.append(model.training and torch.is_grad_enabled())
            )

        def pre_epoch(self) -> None:
            if len(moments) < 2:
                moments.append(states())

        def pre_step(self, batch: Any) -> None:
            if len(moments) < 3:
                moments.append(states())

    config, module, loader = build(Plan(folder, resume=False, ours=True), BEFORE + AFTER)
    config.callbacks["notes"] = Notes()
    names: dict[str, Any] = {"trainer_config": config}
    run_page("olmo", 0, names)
    fit(names["trainer_config"].build(module, loader))
    moved = [
        [name for name in before if before[name] != after[name]]
        for before, after in pairwise(moments)
    ]
    with pytest.raises(RNGStateError) as error:
        names["rng"].load(folder / "run" / f"step{BEFORE}")
    return moved, forwards[0], str(error.value)


def test_what_draws_before_the_first_step(tmp_path: Path) -> None:
    """The page says that the dry run does, which is a training forward, and the iterator."""
    for moved, trains, error in job(RANKS, first_step, tmp_path):
        assert moved == [["torch"], ["torch"]]
        assert trains
        assert "pass that one's reader" in error
