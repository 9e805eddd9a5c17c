"""torchtune's recipe of full finetuning on FSDP2, with the page's lines in a copy of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.frameworks.training import (
    AFTER,
    BATCH,
    BEFORE,
    RANKS,
    Plan,
    Run,
    Verdict,
    blocks_of,
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks

PLACES = {
    "import torch\n": "",
    "    def _setup_lr_scheduler(": " " * 8,
    "            self._checkpoint_client.save_checkpoint(": " " * 12,
}
"""Before these lines of the recipe the blocks of the page go, each with an indent."""

SAVED = "epoch_0/model-00001-of-00001.bin"

whole = Run()
"""What this rank sees of all steps."""


class Loss(torch.nn.CrossEntropyLoss):
    """Called by the recipe once a step on each rank."""

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        loss = super().forward(*args)
        whole.note(loss.detach())
        return loss


class Tokenizer:
    pad_id = 0


class Logger:
    def log_config(self, config: Any) -> None: ...

    def log_dict(self, payload: Any, step: int) -> None: ...


def dataset(tokenizer: Tokenizer) -> list[dict[str, list[int]]]:
    """Return the samples of an epoch: as many steps on every number of ranks."""
    size = BATCH * BEFORE * dist.get_world_size()
    return [{"tokens": [i % 31] * 4, "labels": [1, 2, 3, i % 31]} for i in range(size)]


def model() -> torch.nn.Module:
    from torchtune.models.llama2 import llama2

    return llama2(
        vocab_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=8,
        max_seq_len=8,
        attn_dropout=0.2,
    )


def recipe(ours: bool) -> Any:
    """Return the recipe's class, of a copy with or without the page's lines."""
    import torchtune

    file = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_distributed.py"
    text = file.read_text()
    if ours:
        for (place, spaces), block in zip(PLACES.items(), blocks_of("torchtune"), strict=True):
            assert text.count(f"\n{place}") == 1
            text = text.replace(f"\n{place}", f"\n{indent(block, spaces)}{place}")
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(text, "recipe.py", "exec"), names)
    names["init_process_group"] = lambda backend: None  # the job has one already
    # What the recipe does on an accelerator only, although it takes device=cpu.
    names["training"].get_memory_stats = lambda device: {}
    names["training"].log_memory_stats = lambda stats: None
    names["training"].cleanup_before_training = lambda: None
    return names["FullFinetuneRecipeDistributed"]


def run(plan: Plan) -> Run:
    """Return what this rank sees of all steps."""
    from omegaconf import OmegaConf

    base, output = plan.folder / "base", plan.folder / "output"
    if not plan.resume and dist.get_rank() == 0:
        base.mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.save(model().state_dict(), base / "model.pt")
    dist.barrier()

    def own(name: str, **options: Any) -> dict[str, Any]:
        return {"_component_": f"{__name__}.{name}", **options}

    config = OmegaConf.create(
        {
            "device": "cpu",
            "dtype": "fp32",
            "seed": 42,
            "epochs": 2,
            "max_steps_per_epoch": None,
            "gradient_accumulation_steps": 1,
            "shuffle": True,
            "batch_size": BATCH,
            "resume_from_checkpoint": plan.resume,
            "output_dir": str(output),
            "model": own("model"),
            "tokenizer": own("Tokenizer"),
            "dataset": own("dataset"),
            "loss": own("Loss"),
            "metric_logger": own("Logger"),
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
                "checkpoint_dir": str(base),
                "checkpoint_files": [SAVED if plan.resume else "model.pt"],
                "output_dir": str(output),
                "model_type": "LLAMA2",
            },
        }
    )
    draw(plan.elsewhere)
    finetuning = recipe(plan.ours)(config)
    finetuning.setup(config)
    finetuning.train()
    return whole


def train(plan: Plan) -> Run:
    steps = run(plan)
    return Run(steps.losses[-AFTER:], steps.draws[-AFTER:])


def test_full_finetuning(assert_adopted: Callable[..., Verdict]) -> None:
    own = assert_adopted("torchtune", train)
    assert own.same == "ranks 0, 1 differ (Python, NumPy, torch)"


def test_its_own_resume_repeats_the_first_epoch(tmp_path: Path) -> None:
    saved = job(RANKS, run, Plan(tmp_path, resume=False, ours=False))
    resumed = job(RANKS, run, Plan(tmp_path, resume=True, ours=False))
    assert [steps.draws for steps in resumed] == [steps.draws[:BEFORE] for steps in saved]
