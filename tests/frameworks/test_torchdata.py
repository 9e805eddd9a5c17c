"""torchdata's StatefulDataLoader: it keeps the order of the samples, and none of the streams."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

from nemo_rng_dcp import ResumableLoader, StatefulRNG
from tests.frameworks.training import (
    AFTER,
    BATCH,
    BEFORE,
    Plan,
    Run,
    Verdict,
    data,
    net,
    run_page,
    train_step,
)
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


class Augmented(torch.utils.data.Dataset[torch.Tensor]):
    """Adds noise from torch's global stream: the main process's without workers."""

    def __len__(self) -> int:
        return len(data())

    def __getitem__(self, index: int) -> torch.Tensor:
        return data()[index] + 0.1 * torch.randn(4)


def train(plan: Plan) -> Run:
    from torchdata.stateful_dataloader import StatefulDataLoader

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(42 + rank)
    path = str(plan.folder / "rng")
    names: dict[str, Any] = {"path": path}
    if plan.ours:
        run_page("torchdata", 0, names)
    model = DistributedDataParallel(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sampler = torch.utils.data.DistributedSampler(range(48), num_replicas=size, rank=rank)  # type: ignore[arg-type]
    loader: Any = StatefulDataLoader(Augmented(), batch_size=BATCH, sampler=sampler)
    names["loader"] = loader
    own = plan.folder / f"rank-{rank}.pt"
    if plan.resume:
        draw(plan.elsewhere)
        if own.exists():
            # What the loader keeps is a rank's own: a new rank starts at the beginning.
            saved = torch.load(own, weights_only=False)
            loader.load_state_dict(saved["loader"])
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        if plan.ours:
            run_page("torchdata", 1, names)
        batches = names["batches"] if plan.ours else iter(loader)
    else:
        batches = iter(loader)
        for _ in range(BEFORE):
            train_step(model, optimizer, next(batches))
        plan.folder.mkdir(exist_ok=True)
        entries = {"loader": loader, "model": model, "optimizer": optimizer}
        torch.save({name: entry.state_dict() for name, entry in entries.items()}, own)
        if plan.ours:
            names["rng"].save(path)
    run = Run()
    for _ in range(AFTER):
        run.note(train_step(model, optimizer, next(batches)))
    return run


def test_stateful_data_loader(assert_adopted: Callable[..., Verdict]) -> None:
    assert_adopted("torchdata", train)


def test_the_trap_of_workers(tmp_path: Any) -> None:
    """The page says that what a worker draws is not restored."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    rng = StatefulRNG(seed=42)
    loader: Any = StatefulDataLoader(Augmented(), batch_size=BATCH, num_workers=1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rng.save(tmp_path)
    expected = next(batches)
    again: Any = StatefulDataLoader(Augmented(), batch_size=BATCH, num_workers=1)
    again.load_state_dict(state)
    batches = iter(again)
    rng.load(tmp_path)
    assert not torch.equal(next(batches), expected)


def resume_with_workers(folder: Path, workers: int, every: int) -> None:
    """Save in the middle of an epoch as the page shows it, and go on in new objects."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def begin(seed: int) -> dict[str, Any]:
        names: dict[str, Any] = {"rank": dist.get_rank(), "dataset": Augmented()}
        names["rng"] = StatefulRNG(seed, ranked=True)
        run_page("torchdata", 2, names)
        names["loader"] = StatefulDataLoader(
            names["dataset"],
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            snapshot_every_n_steps=every,
        )
        run_page("torchdata", 3, names)
        return names

    names = begin(1)
    batches = iter(names["loader"])
    for _ in range(BEFORE):
        next(batches)
    dcp.save(names["state"], checkpoint_id=folder)
    expected = [(batch.tolist(), draw()) for batch in batches]
    names = begin(1000)
    dcp.load(names["state"], checkpoint_id=folder)
    batches = iter(names["loader"])
    names["rng"].rewind()
    assert [(batch.tolist(), draw()) for batch in batches] == expected


@pytest.mark.parametrize(("workers", "every"), [(0, 1), (1, 1), (2, 3)])
def test_workers_streams_in_a_dcp_checkpoint(workers: int, every: int, tmp_path: Path) -> None:
    job(2, resume_with_workers, tmp_path, workers, every)


def test_resumable_loader_goes_through_its_batches(tmp_path: Path) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def run(seed: int, load: bool) -> list[Any]:
        rng = StatefulRNG(seed)
        loader: Any = StatefulDataLoader(Augmented(), BATCH, shuffle=True, num_workers=1)
        wrapped = ResumableLoader(loader, rng)
        state = {"rng": rng, "loader": wrapped}
        if load:
            dcp.load(state, checkpoint_id=tmp_path)
            return [(batch.tolist(), draw()) for batch in wrapped]
        batches = iter(wrapped)
        next(batches)
        dcp.save(state, checkpoint_id=tmp_path)
        return [(batch.tolist(), draw()) for batch in batches]

    assert run(1, load=False) == run(2, load=True)
