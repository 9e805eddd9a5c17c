"""verl's checkpoint manager and handler around an FSDP2 model, as its SFT trainer has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.frameworks.training import (
    AFTER,
    BATCH,
    BEFORE,
    RANKS,
    Plan,
    Run,
    Verdict,
    assert_import_continues,
    run_page,
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


class Engine:
    """What verl's handler needs of its engine, whose own needs an accelerator and a tokenizer."""

    def __init__(self, contents: list[str] | None = None) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel
        from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16, "n_positions": 4}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        fully_shard(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)
        self.checkpoint_manager = FSDPCheckpointManager(
            self.module,
            self.optimizer,
            checkpoint_config=None if contents is None else {"load_contents": contents},  # type: ignore[arg-type]
        )

    def save_checkpoint(self, **kwargs: Any) -> None:
        self.checkpoint_manager.save_checkpoint(**kwargs)

    def load_checkpoint(self, path: str) -> None:
        self.checkpoint_manager.load_checkpoint(path)

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.module(x, labels=x).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train(plan: Plan, contents: list[str] | None = None) -> Run:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.utils.checkpoint import CheckpointHandler

    rank, size = dist.get_rank(), dist.get_world_size()
    engine = Engine(contents)
    torch.manual_seed(42 + rank)
    names: dict[str, Any] = {"engine": engine}
    if plan.ours:
        run_page("verl", 0, names)
        run_page("verl", 1, names)
    samples = torch.arange(4 * 48).reshape(48, 4) % 16
    sampler = torch.utils.data.DistributedSampler(range(48), num_replicas=size, rank=rank)  # type: ignore[arg-type]
    loader: Any = StatefulDataLoader(samples, batch_size=BATCH, sampler=sampler)  # type: ignore[arg-type]
    handler = CheckpointHandler(engine, loader, default_local_dir=str(plan.folder))
    if plan.resume:
        draw(plan.elsewhere)
        assert handler.load_checkpoint() == BEFORE
    batches = iter(loader)
    if not plan.resume:
        for _ in range(BEFORE):
            engine.step(next(batches))
        handler.save_checkpoint(BEFORE)
    run = Run()
    for _ in range(AFTER):
        run.note(engine.step(next(batches)))
    return run


def with_other_weights(plan: Plan) -> Run:
    """On another number of ranks start from other weights: verl has no files for it."""
    elsewhere = plan.ours and dist.get_world_size() != RANKS
    return train(plan, [] if elsewhere else None)


def test_checkpoint_handler(assert_adopted: Callable[..., Verdict]) -> None:
    own = assert_adopted("verl", with_other_weights)
    missing = "FileNotFoundError"
    assert (own.same, own.fewer, own.more) == ("ranks 0, 1 differ (torch)", missing, missing)


def save_by_itself(path: str) -> list[float]:
    engine = Engine()
    torch.manual_seed(42 + dist.get_rank())
    draw()
    engine.checkpoint_manager.save_checkpoint(path)
    return draw()


def load_by_itself(path: str) -> list[float]:
    engine = Engine()
    draw()
    engine.load_checkpoint(path)
    return draw()


def test_import_reads_its_files(tmp_path: Path) -> None:
    assert_import_continues(save_by_itself, tmp_path)


def test_its_manager_is_exact_where_no_loader_draws_after_the_load(tmp_path: Path) -> None:
    """The page says so of the workers of its PPO trainer."""
    expected = job(RANKS, save_by_itself, str(tmp_path))
    assert job(RANKS, load_by_itself, str(tmp_path)) == expected
