"""NeMo Automodel's finetuning recipe, whole: its model, optimizer, loader, scheduler and loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.frameworks.conftest import VERDICTS
from tests.frameworks.training import AFTER, BATCH, BEFORE, Plan, Run, judge, run_page
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


def config(checkpoints: Path, restore_from: Path | None) -> dict[str, Any]:
    """Return a recipe's YAML: a tiny GPT-2 with dropout, and the package's mock dataset."""
    return {
        "seed": 42,
        "dist_env": {"backend": "gloo"},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {
                "_target_": "transformers.GPT2Config",
                "vocab_size": 100,
                "n_positions": 64,
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
            },
            "torch_dtype": "float32",
            "attn_implementation": "eager",
            "use_liger_kernel": False,
            "use_sdpa_patching": False,
        },
        "distributed": {"strategy": "fsdp2", "dp_size": "none", "tp_size": 1, "cp_size": 1},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock.build_unpacked_dataset",
            "num_sentences": 48,
            "mean_len": 10.0,
            "std_len": 0.0,
            "vocab_size": 100,
            "max_sentence_len": 32,
        },
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
            "shuffle": True,
        },
        "step_scheduler": {
            "global_batch_size": BATCH * dist.get_world_size(),
            "local_batch_size": BATCH,
            "ckpt_every_steps": BEFORE,
            "save_checkpoint_every_epoch": False,
            "num_epochs": 1,
            "max_steps": BEFORE + AFTER,
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(checkpoints),
            "restore_from": str(restore_from) if restore_from else None,
            "model_save_format": "torch_save",
            "save_consolidated": False,
        },
    }


def on_the_cpu() -> None:
    """Stub what the recipe asks of CUDA: statistics, and the device that the model is put on."""
    from nemo_automodel._transformers import auto_model

    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.max_memory_allocated = lambda *_: 0
    torch.cuda.current_device = lambda: 0
    apply = auto_model.apply_model_infrastructure
    auto_model.apply_model_infrastructure = lambda *args, **options: apply(
        *args, **{**options, "device": torch.device("cpu")}
    )


def train(plan: Plan) -> Run:
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes.llm import train_ft

    on_the_cpu()
    names: dict[str, Any] = {"Recipe": train_ft.TrainFinetuneRecipeForNextTokenPrediction}
    if plan.ours:
        run_page("automodel", 0, names)
    run = Run()

    class Observed(names["Recipe"]):  # type: ignore[misc]
        def load_checkpoint(self, restore_from: str | None = None) -> None:
            draw(plan.elsewhere)
            super().load_checkpoint(restore_from)

        def log_train_metrics(self, log_data: Any) -> None:
            super().log_train_metrics(log_data)
            run.note(log_data.metrics["loss"])

    # Of its steps, which count from 0, the recipe saves the third and the sixth.
    saved = plan.folder / "saved"
    settings = config(saved, None)
    if plan.resume:
        resumed = plan.folder / f"resumed-{dist.get_world_size()}-{plan.elsewhere}"
        settings = config(resumed, saved / f"epoch_0_step_{BEFORE - 1}")
    recipe = Observed(ConfigNode(settings))
    recipe.setup()
    recipe.run_train_validation_loop()
    return Run(run.losses[-AFTER:], run.draws[-AFTER:])


def test_finetuning_recipe(tmp_path: Path) -> None:
    own = judge(train, tmp_path / "own", ours=False)
    ours = judge(train, tmp_path / "ours", ours=True)
    VERDICTS["NeMo Automodel, finetuning"] = own, ours
    assert own.same == "ranks 0, 1 differ (torch)"
    assert (ours.same, ours.fewer) == ("exact", "rank 0 continues"), ours.errors
    # More ranks than there are files of its data loader are refused, whatever the streams are.
    assert ours.more == "FileNotFoundError"
    assert "dataloader/dataloader_dp_rank_2.pt" in ours.errors
