"""NeMo Automodel's BaseRecipe and Checkpointer around an FSDP2 model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import nemo_rng_dcp
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
    net,
    run_page,
    train_step,
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


def set_up(folder: Path) -> Any:
    """Return a recipe with a model, an optimizer, and the real checkpointer."""
    from nemo_automodel.components.checkpoint.checkpointing import Checkpointer, CheckpointingConfig
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes.base_recipe import BaseRecipe

    config = CheckpointingConfig(
        checkpoint_dir=str(folder), model_save_format="torch_save", save_consolidated=False
    )
    recipe: Any = BaseRecipe()
    recipe.checkpointer = Checkpointer(config, dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0)
    recipe.model = fully_shard(net())
    recipe.optimizer = torch.optim.AdamW(recipe.model.parameters(), lr=0.01)
    recipe.peft_config = None
    recipe.cfg = ConfigNode({"model": "none"})
    return recipe


def batches(skipped: int) -> Any:
    """Return a new iterator, as a recipe makes one after the load; it draws from torch's stream."""
    sampler = DistributedSampler(range(48), dist.get_world_size(), dist.get_rank())  # type: ignore[arg-type]
    iterator = iter(DataLoader(data(), batch_size=BATCH, sampler=sampler))  # type: ignore[arg-type]
    for _ in range(skipped):
        next(iterator)
    return iterator


def train(plan: Plan) -> Run:
    from nemo_automodel.components.training.rng import StatefulRNG

    recipe = set_up(plan.folder)
    names = {"recipe": recipe}
    if plan.ours:
        run_page("automodel", 0, names)
        run_page("automodel", 1, names)
    else:
        recipe.rng = StatefulRNG(42, ranked=True)
    if plan.resume:
        draw(plan.elsewhere)
        recipe.load_checkpoint(f"epoch_0_step_{BEFORE}")
        iterator = batches(BEFORE)
    else:
        iterator = batches(0)
        for _ in range(BEFORE):
            train_step(recipe.model, recipe.optimizer, next(iterator))
        recipe.save_checkpoint(0, BEFORE, 0.0)
    run = Run()
    for _ in range(AFTER):
        run.note(train_step(recipe.model, recipe.optimizer, next(iterator)))
    return run


def test_base_recipe(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("NeMo Automodel", train)


def without_the_elastic_checkpointer(plan: Plan) -> tuple[list[float], str]:
    recipe = set_up(plan.folder)
    recipe.rng = nemo_rng_dcp.StatefulRNG(seed=42, ranked=True)
    if not plan.resume:
        recipe.save_checkpoint(0, BEFORE, 0.0)
        return draw(), ""
    try:
        recipe.load_checkpoint(f"epoch_0_step_{BEFORE}")
    except CheckpointException as error:
        return [], str(error)
    return draw(), ""


def test_the_trap_of_another_number_of_ranks(tmp_path: Path) -> None:
    """The page says that one line is exact on as many ranks, and an error on others."""
    expected = job(RANKS, without_the_elastic_checkpointer, Plan(tmp_path, False, True))
    resume = Plan(tmp_path, True, True)
    assert job(RANKS, without_the_elastic_checkpointer, resume) == expected
    for _, error in job(3, without_the_elastic_checkpointer, resume):
        assert "Size mismatch" in error


def save_by_itself(path: str) -> list[float]:
    from nemo_automodel.components.training.rng import StatefulRNG

    recipe = set_up(Path(path))
    recipe.rng = StatefulRNG(42, ranked=True)
    draw()
    recipe.save_checkpoint(0, BEFORE, 0.0)
    return draw()


def test_import_reads_its_files(tmp_path: Path) -> None:
    assert_import_continues(save_by_itself, tmp_path, f"epoch_0_step_{BEFORE}")
