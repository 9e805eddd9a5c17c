"""Seeds and streams with real DataLoader workers, and mid-epoch resumes, on real ranks."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nemo_rng_dcp import ScopedRNG, StatefulRNG, derive_seed, seed_worker
from tests.support.jobs import job
from tests.support.streams import draw, states

SEED = 42
SAMPLES = 16
EPOCHS = 2
SAVED_EPOCH, SAVED_BATCH = 0, 3
"""A checkpoint is taken in this epoch, after this many batches."""

Loader = Callable[[int, int], DataLoader[torch.Tensor]]
"""Makes the loader of an epoch with a number of workers."""


sizes = pytest.mark.parametrize("size", [1, 3])


class Drawing(Dataset[torch.Tensor]):
    """Samples that draw from every global stream of the process that makes them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, *draw()], dtype=torch.float64)


class Augmented(Drawing):
    """Samples that draw what belongs to the sample and the epoch, whoever makes them."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> torch.Tensor:
        with ScopedRNG(derive_seed(SEED, "augment", self.epoch, index)):
            return super().__getitem__(index)


class Streams(Dataset[Any]):
    """Each item is where the streams of its worker are: a digest by generator."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, str]:
        return fingerprints()


def fingerprints() -> dict[str, str]:
    return {name: sha256(repr(state).encode()).hexdigest() for name, state in states().items()}


def worker_streams(generator: torch.Generator | None = None) -> list[dict[str, str]]:
    """Return where the streams of two workers begin."""
    loader = DataLoader(
        Streams(), None, num_workers=2, worker_init_fn=seed_worker, generator=generator
    )
    return list(loader)


def begin_streams() -> list[dict[str, str]]:
    """Where the streams of this rank and of its workers in two epochs begin."""
    StatefulRNG(SEED, ranked=True)
    return [fingerprints(), *worker_streams(), *worker_streams()]


@sizes
def test_streams_differ_by_rank_worker_and_epoch(size: int) -> None:
    everywhere = [streams for rank in job(size, begin_streams) for streams in rank]
    for name in ("python", "numpy", "torch"):
        found = [streams[name] for streams in everywhere]
        assert len(set(found)) == 5 * size, f"workers share a {name} stream"


def begin_unranked_streams() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Where the workers of one stream begin, and those of a loader with its own generator."""
    StatefulRNG(SEED)
    shared = worker_streams()
    own = torch.Generator().manual_seed(derive_seed(SEED, dist.get_rank()))
    return shared, worker_streams(own)


@sizes
def test_ranks_of_one_stream_have_workers_that_agree(size: int) -> None:
    """Tensor-parallel peers need the same samples; a loader's own generator decides as well."""
    results = job(size, begin_unranked_streams)
    assert [shared for shared, _ in results] == [results[0][0]] * size
    assert len({repr(own) for _, own in results}) == size


def augmented_samples(workers: int) -> dict[tuple[int, int], list[float]]:
    """The numbers of this rank's samples, by epoch and sample."""
    StatefulRNG(SEED + dist.get_world_size(), ranked=True)
    return {
        (epoch, int(index)): numbers
        for epoch in range(EPOCHS)
        for index, *numbers in rows_of_epoch(epoch, workers)
    }


def test_a_sample_is_augmented_alike_for_any_ranks_and_workers() -> None:
    found = []
    for size, workers in ((1, 0), (1, 2), (2, 0), (4, 2)):
        ranks = job(size, augmented_samples, workers)
        assert sum(map(len, ranks)) == EPOCHS * SAMPLES, "two ranks have the same sample"
        found.append({sample: n for rank in ranks for sample, n in rank.items()})
    assert found == [found[0]] * 4
    distinct = {tuple(numbers) for numbers in found[0].values()}
    assert len(distinct) == len(found[0]) == EPOCHS * SAMPLES


def rows_of_epoch(epoch: int, workers: int) -> list[list[float]]:
    return [row for batch in order_of_its_own(epoch, workers) for row in batch.tolist()]


def generator_of_its_own(epoch: int, workers: int) -> DataLoader[torch.Tensor]:
    """Order and worker seeds both come from a generator that knows only epoch and rank."""
    seed = derive_seed(SEED, "loader", epoch, dist.get_rank())
    return DataLoader(
        Drawing(),
        batch_size=2,
        shuffle=True,
        num_workers=workers,
        worker_init_fn=seed_worker,
        generator=torch.Generator().manual_seed(seed),
    )


def order_of_its_own(epoch: int, workers: int) -> DataLoader[torch.Tensor]:
    """The order comes from the epoch and the samples seed themselves, the workers do not matter."""
    dataset = Augmented(epoch)
    sampler = DistributedSampler(dataset, shuffle=True, seed=SEED)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size=1, sampler=sampler, num_workers=workers)


def nothing_of_its_own(epoch: int, workers: int) -> DataLoader[torch.Tensor]:
    """Order and worker seeds both come from torch's global stream."""
    return DataLoader(
        Drawing(), batch_size=2, shuffle=True, num_workers=workers, worker_init_fn=seed_worker
    )


def train(loader: Loader, workers: int, path: Path) -> list[Any]:
    """Train without interruption; return the steps after the checkpoint: batch and draws."""
    rng = StatefulRNG(SEED, ranked=True)
    steps = []
    for epoch in range(EPOCHS):
        epoch_start = rng.state_dict()
        for number, batch in enumerate(loader(epoch, workers), start=1):
            steps.append((batch.tolist(), draw()))
            if (epoch, number) == (SAVED_EPOCH, SAVED_BATCH):
                dcp.save({"rng": rng, "epoch_start": epoch_start}, checkpoint_id=path)
                steps.clear()
    return steps


def resume(loader: Loader, workers: int, path: Path, rewind: bool) -> list[Any]:
    """Do the steps after the checkpoint again, as a new process would."""
    rng = StatefulRNG(1000, ranked=True)
    draw(dist.get_rank())
    dcp.load({"rng": rng}, checkpoint_id=path)
    batches = iter(loader(SAVED_EPOCH, workers))
    for _ in range(SAVED_BATCH):
        next(batches)
    if rewind:
        rng.rewind()
    steps = [(batch.tolist(), draw()) for batch in batches]
    for epoch in range(SAVED_EPOCH + 1, EPOCHS):
        steps += [(batch.tolist(), draw()) for batch in loader(epoch, workers)]
    return steps


def resume_with_a_generator(workers: int, checkpoint: Path) -> None:
    expected = train(generator_of_its_own, workers, checkpoint)
    assert resume(generator_of_its_own, workers, checkpoint, rewind=True) == expected
    without = resume(generator_of_its_own, workers, checkpoint, rewind=False)
    # Without workers the skipped batches draw from the global streams; otherwise nothing does.
    assert (without == expected) == (workers > 0)


@sizes
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_a_generator_of_its_own_continues_mid_epoch(
    size: int, workers: int, tmp_path: Path
) -> None:
    job(size, resume_with_a_generator, workers, tmp_path)


def resume_samples_that_seed_themselves(workers: int, checkpoint: Path) -> None:
    expected = train(order_of_its_own, workers, checkpoint)
    assert resume(order_of_its_own, workers, checkpoint, rewind=True) == expected
    without = resume(order_of_its_own, workers, checkpoint, rewind=False)
    assert [batch for batch, _ in without] == [batch for batch, _ in expected]
    # The fresh iterator drew its base seed, so no later draw is the uninterrupted run's.
    assert all(w != e for (_, w), (_, e) in zip(without, expected, strict=True))


@sizes
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_seed_themselves_continue_mid_epoch(
    size: int, workers: int, tmp_path: Path
) -> None:
    job(size, resume_samples_that_seed_themselves, workers, tmp_path)


def rewind_after_a_fresh_iterator(workers: int, checkpoint: Path) -> None:
    train(nothing_of_its_own, workers, checkpoint)
    rng = StatefulRNG(1000, ranked=True)
    dcp.load({"rng": rng}, checkpoint_id=checkpoint)
    loaded = states()
    batches = iter(nothing_of_its_own(SAVED_EPOCH, workers))
    assert states()["torch"] != loaded["torch"]
    next(batches)
    rng.rewind()
    assert states() == loaded


@sizes
@pytest.mark.parametrize("workers", [0, 2])
def test_a_fresh_iterator_moves_the_streams_and_rewind_undoes_it(
    size: int, workers: int, tmp_path: Path
) -> None:
    job(size, rewind_after_a_fresh_iterator, workers, tmp_path)


def resume_from_the_start_of_the_epoch(workers: int, checkpoint: Path) -> None:
    expected = train(nothing_of_its_own, workers, checkpoint)
    # rewind() alone cannot bring back the order, which torch drew when the epoch began.
    assert resume(nothing_of_its_own, workers, checkpoint, rewind=True) != expected
    rng = StatefulRNG(1000, ranked=True)
    epoch_start = rng.state_dict()
    dcp.load({"rng": rng, "epoch_start": epoch_start}, checkpoint_id=checkpoint)
    saved = rng.state_dict()
    rng.load_state_dict(epoch_start)
    batches = iter(nothing_of_its_own(SAVED_EPOCH, workers))
    for _ in range(SAVED_BATCH):
        next(batches)
    rng.load_state_dict(saved)
    steps = [(batch.tolist(), draw()) for batch in batches]
    for epoch in range(SAVED_EPOCH + 1, EPOCHS):
        steps += [(b.tolist(), draw()) for b in nothing_of_its_own(epoch, workers)]
    assert steps == expected


@sizes
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_continues_mid_epoch_from_the_start_of_the_epoch(
    size: int, workers: int, tmp_path: Path
) -> None:
    job(size, resume_from_the_start_of_the_epoch, workers, tmp_path)


# What docs/dataloaders.md says does not work without ResumableLoader.


def test_a_samplers_generator_that_is_registered_does_not_bring_back_the_order() -> None:
    """torch draws the order when the epoch begins; the saved stream is behind that."""

    def begin(seed: int) -> tuple[StatefulRNG, DataLoader[Any]]:
        shuffle = torch.Generator().manual_seed(seed)
        rng = StatefulRNG(seed, shared_generators={"shuffle": shuffle})
        return rng, DataLoader(range(SAMPLES), shuffle=True, generator=shuffle)  # type: ignore[arg-type]

    rng, loader = begin(1)
    before = rng.state_dict()
    batches = iter(loader)
    first = next(batches)
    within = rng.state_dict()
    order = torch.cat([first, *batches]).tolist()
    for state, comes_back in ((before, True), (within, False)):
        rng, loader = begin(2)
        rng.load_state_dict(state)
        assert (torch.cat(list(loader)).tolist() == order) == comes_back


def test_a_generator_that_workers_draw_from_is_registered_in_vain() -> None:
    noise = np.random.default_rng(1)
    rng = StatefulRNG(1, generators={"noise": noise})

    class Noisy(Drawing):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(noise.random())

    before = rng.fingerprint()["noise"]
    list(DataLoader(Noisy(), num_workers=1))
    assert rng.fingerprint()["noise"] == before


def test_persistent_workers_do_not_begin_a_later_epoch_again() -> None:
    def epochs(*numbers: int) -> list[list[float]]:
        generator = torch.Generator()
        loader = DataLoader(
            Drawing(), shuffle=True, num_workers=1, persistent_workers=True, generator=generator
        )
        orders = []
        for number in numbers:
            generator.manual_seed(number)
            orders.append([batch[0, 0].item() for batch in loader])
        return orders

    assert epochs(0, 1)[1] != epochs(1)[0]
