"""Lightning's Trainer over a ``ResumableLoader``: its loop has no line of ours inside."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from tests.frameworks.training import data, net, run_page
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks

EPOCHS, BATCH = 3, 8


class Augmented(torch.utils.data.Dataset[torch.Tensor]):
    """Samples with a noise of the process that makes them."""

    def __len__(self) -> int:
        return len(data())

    def __getitem__(self, index: int) -> torch.Tensor:
        return data()[index] + torch.tensor(draw()[:4])


def train(folder: str, at: tuple[int, Any], workers: int, resume: int | None) -> tuple[Any, int]:
    """Train with validation; return the steps behind the checkpoint, and its number."""
    import pytorch_lightning as lightning

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank if resume is None else 100)
    sampler = DistributedSampler(Augmented(), size, rank)
    names: dict[str, Any] = {
        "path": folder,
        "loader": DataLoader(Augmented(), BATCH, sampler=sampler, num_workers=workers),
        "step": resume,
    }
    run_page("lightning", 0, names)
    steps: list[Any] = []
    saved: list[int] = []

    class Model(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, number: int) -> Any:
            loss = self.net(batch).square().mean()
            steps.append((self.trainer.current_epoch, number, loss.item(), draw()))
            return loss

        def validation_step(self, batch: Any, number: int) -> None:
            draw()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    class Save(lightning.Callback):  # type: ignore[misc]
        def save(self, trainer: Any, place: Any) -> None:
            if resume is None and (trainer.current_epoch, place) == at:
                trainer.save_checkpoint(f"{folder}/lightning.ckpt")
                saved.append(trainer.global_step)
                steps.clear()

        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            self.save(trainer, arguments[-1])

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.save(trainer, "end")

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                self.save(trainer, "validation")

    trainer: Any = lightning.Trainer(
        **{"accelerator": "cpu", "devices": size, "max_epochs": EPOCHS, "logger": False},
        **{"enable_progress_bar": False, "enable_checkpointing": False},
        **{"enable_model_summary": False, "use_distributed_sampler": False},
        strategy="ddp" if size > 1 else "auto",
        callbacks=[Save(), names["Beside"]()],
    )
    checkpoint = None
    if resume is not None:
        draw(3)
        run_page("lightning", 1, names)
        checkpoint = f"{folder}/lightning.ckpt"
    validation = DataLoader(Augmented(), BATCH)
    trainer.fit(Model(), names["loader"], validation, ckpt_path=checkpoint)
    return steps, saved[0] if saved else 0


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [(0, 0), (1, 1), (1, "validation"), (1, "end")])
def test_its_loop_resumes(size: int, workers: int, at: Any, tmp_path: Path) -> None:
    found = job(size, train, str(tmp_path), at, workers, None)
    expected = [steps for steps, _ in found]
    assert all(expected)
    again = job(size, train, str(tmp_path), at, workers, found[0][1])
    assert [steps for steps, _ in again] == expected


def test_behind_the_last_batch_the_next_epoch_begins(tmp_path: Path) -> None:
    """The page says that the validation in between is missing."""
    ((expected, step),) = job(1, train, str(tmp_path), (1, 5), 0, None)
    ((found, _),) = job(1, train, str(tmp_path), (1, 5), 0, step)
    assert [steps[:2] for steps in found] == [steps[:2] for steps in expected]
    assert len(found) == 6
