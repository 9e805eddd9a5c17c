"""The Trainer of Transformers: its own loop, its own checkpoints, our callback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


class Model(nn.Module):
    """The model as the Trainer wants one: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(x).square().mean()}


def masked(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate as for masked language modelling: from torch's global stream, in the main process."""
    x = torch.stack([sample["x"] for sample in samples])
    return {"x": torch.where(torch.rand_like(x) < 0.3, 0.0, x)}


def train(plan: Plan, data_seed: int | None = 7, masks: bool = False, workers: int = 0) -> Run:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    names: dict[str, Any] = {}
    base: Any = Trainer
    if plan.ours and masks:
        run_page("transformers", 1, names)
        base = names["ResumableTrainer"]
    arguments = TrainingArguments(
        output_dir=str(plan.folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        max_steps=BEFORE + AFTER,
        save_strategy="no" if plan.resume else "steps",
        save_steps=BEFORE,
        logging_steps=1,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        seed=42,
        data_seed=data_seed,
        dataloader_num_workers=workers,
        ignore_data_skip=plan.ours and masks,
    )
    run = Run()

    class Notes(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            draw(plan.elsewhere)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > BEFORE:
                run.note(losses[-1])

    class Noting(base):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            run.samples += args[1]["x"][:, 0].tolist()
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    losses: list[float] = []
    dataset = [{"x": sample} for sample in data()]
    trainer = Noting(
        model=Model(),
        args=arguments,
        train_dataset=dataset,
        data_collator=masked if masks else None,
        callbacks=[Notes()],
    )
    names["trainer"] = trainer
    if plan.ours:
        run_page("transformers", 2 if masks else 0, names)
    saved = str(plan.folder / f"checkpoint-{BEFORE}")
    trainer.train(resume_from_checkpoint=saved if plan.resume else None)
    return run


def test_trainer(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("HF Trainer", train)


def train_with_masks(plan: Plan) -> Run:
    return train(plan, masks=True)


def train_with_masks_in_workers(plan: Plan) -> Run:
    return train(plan, masks=True, workers=1)


@pytest.mark.parametrize("masked", [train_with_masks, train_with_masks_in_workers])
def test_a_collator_that_draws(masked: Callable[[Plan], Run], tmp_path: Path) -> None:
    """The page says that the Trainer's own resume is not exact, and how it is."""

    def resumes_exactly(ours: bool) -> bool:
        folder = tmp_path / str(ours)
        expected = job(RANKS, masked, Plan(folder, resume=False, ours=ours))
        found = job(RANKS, masked, Plan(folder, resume=True, ours=ours, elsewhere=1))
        assert expected[0].losses != expected[1].losses
        return [run.losses for run in found] == [run.losses for run in expected]

    assert resumes_exactly(ours=True)
    assert not resumes_exactly(ours=False)


def test_the_trap_of_the_data_seed(tmp_path: Path) -> None:
    """The page says that ranks see each other's samples unless data_seed is set."""
    plan = Plan(tmp_path, resume=False, ours=True)
    seen, of = distinct(job(RANKS, train, plan))
    assert seen == of == RANKS * BATCH * (BEFORE + AFTER)
    seen, of = distinct(job(RANKS, train, plan, None))
    assert seen < of


def save_by_itself(path: str) -> list[float]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    drawn: list[float] = []

    class Notes(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            draw(args.process_index + 1)  # the Trainer seeds all alike

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            drawn.extend(draw())

    arguments = TrainingArguments(
        output_dir=path, use_cpu=True, max_steps=1, save_steps=1, report_to=[], disable_tqdm=True
    )
    dataset = [{"x": sample} for sample in data()]
    Trainer(model=Model(), args=arguments, train_dataset=dataset, callbacks=[Notes()]).train()
    return drawn


def test_import_reads_its_files(tmp_path: Path) -> None:
    assert_import_continues(save_by_itself, tmp_path)
