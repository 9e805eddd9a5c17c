"""A training run over a ``ResumableLoader``, which is interrupted anywhere and compared."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    get_worker_info,
)

from nemo_rng_dcp import ResumableLoader, StatefulRNG
from nemo_rng_dcp.ranks import global_rank, world_size
from tests.support.streams import draw

SAMPLES = 7
EPOCHS = 2

Step = tuple[int, int, Any, list[float]]
"""Epoch, batch of the epoch, the batch, what the model drew for it."""


class Drawing(Dataset[list[float]]):
    """Samples that draw from every global stream of the process that makes them."""

    def __init__(self, draws: bool = True, bad: int | None = None) -> None:
        self.draws, self.bad = draws, bad

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> list[float]:
        if index == self.bad:
            draw()
            raise OSError(f"sample {index} cannot be read")
        return [index, *(draw() if self.draws else [])]


class OwnGenerator(Drawing):
    """Samples that draw from a generator of the dataset's own."""

    def __init__(self) -> None:
        super().__init__(draws=False)
        self.noise = np.random.default_rng(3)

    def __getitem__(self, index: int) -> list[float]:
        return [index, self.noise.random()]


class Anew(OwnGenerator):
    """Samples that draw from a generator that each epoch begins with."""

    def set_epoch(self, epoch: int) -> None:
        self.noise = np.random.default_rng(epoch)


class Stream(IterableDataset[list[float]]):
    """Samples in an order of the worker's, sharded over workers and ranks."""

    def __iter__(self) -> Iterator[list[float]]:
        info = get_worker_info()
        number, count = (0, 1) if info is None else (info.id, info.num_workers)
        shard = list(range(SAMPLES * 2))[global_rank() :: world_size()][number::count]
        random.shuffle(shard)
        for index in shard:
            yield [index, *draw()]


class Shuffled:
    """An iterable that is no DataLoader."""

    def __init__(self, draws: bool) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[list[float]]:
        for index in np.random.permutation(SAMPLES).tolist():
            yield [index, *(draw() if self.draws else [])]


class Prefetcher:
    """Asks a loader for each batch before the one before it is handed out."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        ahead = next(batches, None)
        while ahead is not None:
            batch, ahead = ahead, next(batches, None)
            yield batch


class PythonSampler(Sampler[int]):
    """Draws its order, at once, from a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(7)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(SAMPLES), SAMPLES))


class ListSampler(Sampler[int]):
    """Draws its order from a generator that it keeps in a list."""

    def __init__(self) -> None:
        self.generators = [np.random.default_rng(7)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.generators[0].permutation(SAMPLES).tolist())


class LazySampler(Sampler[int]):
    """Draws each index when it is asked for it, from all global streams."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            drawn = random.randrange(99) + int(np.random.randint(99)) + int(torch.randint(99, ()))
            yield drawn % SAMPLES


class NoisyCollate:
    """Draws while samples become a batch."""

    def __init__(self, draws: bool) -> None:
        self.draws = draws

    def __call__(self, samples: Any) -> Any:
        return [samples, draw() if self.draws else []]


ORDERS = (
    "shuffle",
    "registered",
    "shared",
    "model",
    "loader's own",
    "sampler's own",
    "python",
    "distributed",
    "weighted",
    "replacement",
    "batch sampler",
    "list",
    "lazy",
    "none",
    "unbatched",
    "dataset's own",
    "datasets' own",
    "epoch's own",
    "closure",
    "stream",
    "prefetcher",
    "iterable",
)

BATCHES = {"python": 4, "list": 4, "lazy": 4, "stream": 7, "prefetcher": 4, "iterable": 7}
"""What a pass has, of loaders that do not tell."""


def loader_of(
    order: str, workers: int, places: str, generators: dict[str, Any], **more: Any
) -> Any:
    """Return a loader whose order comes from somewhere, and whose batches draw somewhere."""
    dataset: Any = Drawing("sample" in places)
    options: dict[str, Any] = {
        "batch_size": 2,
        "num_workers": workers,
        "collate_fn": NoisyCollate("collate" in places),
        **more,
    }
    if order == "iterable":
        return Shuffled("sample" in places)
    if order in ("shuffle", "prefetcher"):
        options["shuffle"] = True
    elif order in ("registered", "shared", "model"):
        options |= {"shuffle": True, "generator": generators["order"]}
    elif order == "loader's own":
        options |= {"shuffle": True, "generator": torch.Generator().manual_seed(5 + global_rank())}
    elif order == "sampler's own":
        options["sampler"] = RandomSampler(dataset, generator=torch.Generator().manual_seed(5))
    elif order == "python":
        options["sampler"] = PythonSampler()
    elif order == "distributed":
        options["sampler"] = DistributedSampler(dataset, world_size(), global_rank())
    elif order == "weighted":
        options["sampler"] = WeightedRandomSampler(range(1, SAMPLES + 1), 9)
    elif order == "replacement":
        options["sampler"] = RandomSampler(dataset, replacement=True, num_samples=9)
    elif order == "batch sampler":
        del options["batch_size"]
        options["batch_sampler"] = BatchSampler(RandomSampler(dataset), 2, drop_last=True)
    elif order == "list":
        options["sampler"] = ListSampler()
    elif order == "lazy":
        options["sampler"] = LazySampler()
    elif order == "unbatched":
        options |= {"batch_size": None, "shuffle": True}
    elif order == "dataset's own":
        dataset, options["shuffle"] = OwnGenerator(), True
    elif order == "datasets' own":
        dataset, options["shuffle"] = ConcatDataset([OwnGenerator(), OwnGenerator()]), True
    elif order == "epoch's own":
        dataset, options["shuffle"] = Anew(), True
    elif order == "closure":
        noise, options["shuffle"] = np.random.default_rng(6), True
        options["collate_fn"] = lambda samples: (samples, noise.random())
    elif order == "stream":
        dataset = Stream()
    loader: Any = DataLoader(dataset, **options)
    return Prefetcher(loader) if order == "prefetcher" else loader


@dataclass(frozen=True)
class Case:
    """A loader: where its order comes from, its workers, where its batches draw."""

    order: str
    workers: int = 0
    places: str = "sample, collate"
    way: str = "once"


WAYS = ("once", "validated", "cut", "async", "chained", "live", "zipped")
"""What happens to a run: it resumes once; validates inside of an epoch; ends its epochs early;
saves in the background; saves right after a load, and resumes from that; goes back to a checkpoint
while its loop is under way; has a second loader, by ``zip``."""

Point = tuple[int, Any]
"""When to save: in an epoch, behind a batch, or at its ``"end"``; ``(0, 0)`` is before the loop."""


class Run:
    """A process of the training, new or resumed.

    Args:
        case: The loader.
        seed: A resumed process has another one, which must not matter.
        loader: What is wrapped instead.

    Attributes:
        steps: What was trained.
        back_to: A checkpoint that is loaded behind the next batch, while the loop is under way.
    """

    def __init__(
        self,
        case: Case,
        seed: int = 42,
        *,
        loader: Any = None,
    ) -> None:
        self.case = case
        order = {"order": torch.Generator().manual_seed(1)}
        noise = {"noise": np.random.default_rng(2)}
        shared = case.order == "shared"
        self.rng = StatefulRNG(
            seed,
            ranked=True,
            generators=noise if shared else {**noise, **order},
            shared_generators=order if shared else {},
        )
        self.generators: dict[str, Any] = {**noise, **order}
        inner = loader or loader_of(case.order, case.workers, case.places, self.generators)
        limit = 3 if case.way == "cut" else None
        if case.way == "zipped" and case.order in BATCHES:
            # zip does not ask the second loader once the first has ended.
            limit = BATCHES[case.order]
        self.loader = ResumableLoader(inner, self.rng, batches_per_epoch=limit)
        self.other: ResumableLoader | None = None
        if case.way == "zipped":
            other = loader_of(case.order, 0, case.places, self.generators)
            self.other = ResumableLoader(other, self.rng, batches_per_epoch=limit)
        self.steps: list[Step] = []
        self.back_to: Path | None = None

    @property
    def state(self) -> dict[str, Any]:
        others = {} if self.other is None else {"other": self.other}
        return {"rng": self.rng, "loader": self.loader, **others}

    def save(self, folder: Path) -> None:
        if self.case.way == "async":
            response: Any = dcp.async_save(self.state, checkpoint_id=folder)
            response.result()
        else:
            dcp.save(self.state, checkpoint_id=folder)

    def load(self, folder: Path) -> "Run":
        dcp.load(self.state, checkpoint_id=folder)
        return self

    def disturb(self) -> "Run":
        """Draw what a resumed job may draw before its first step."""
        self.draw()
        list(DataLoader(Drawing(), shuffle=True))
        return self

    def draw(self) -> list[float]:
        """Draw as the model does."""
        numbers = [*draw(), self.generators["noise"].random()]
        if self.case.order == "model":
            numbers.append(torch.rand((), generator=self.generators["order"]).item())
        return numbers

    def _batches(self) -> Any:
        return self.loader if self.other is None else zip(self.loader, self.other, strict=False)

    def _go_back(self) -> None:
        if self.back_to is not None:
            checkpoint, self.back_to = self.back_to, None
            self.load(checkpoint).disturb().steps.clear()

    def train(self, saves: Mapping[Point, Path] | None = None, until: Point | None = None) -> "Run":
        """Train to the end or until a point, and save at some points."""
        saves = {} if saves is None else saves
        for epoch in self.loader.epochs(EPOCHS):
            self.draw()
            for batch in self._batches():
                self.steps.append((self.loader.epoch, self.loader.batches, batch, self.draw()))
                if self.case.way == "validated":
                    list(DataLoader(Drawing(), shuffle=True))
                if self._reached((epoch, self.loader.batches), saves, until):
                    return self
                self._go_back()
            if self._reached((epoch, "end"), saves, until):
                return self
        return self

    def _reached(self, point: Point, saves: Mapping[Point, Path], until: Point | None) -> bool:
        if point in saves:
            self.save(saves[point])
        return point == until


def behind(steps: list[Step], point: Point) -> list[Step]:
    """Return the steps that come after a point."""
    last = (point[0], float("inf") if point[1] == "end" else point[1])
    return [step for step in steps if step[:2] > last]


def check_resumes(case: Case, folder: Path, points: list[Point]) -> None:
    """Resume a run from each of the points, and compare it with the one that was not interrupted.

    Compared are the batches, what the model drew for each, and where every stream is at the end.
    """
    expected = Run(case).train()
    last = max(batch for epoch, batch, *_ in expected.steps if epoch == 0)
    points = [(epoch, last if batch == "last" else batch) for epoch, batch in points]
    saves = {point: folder / f"{point[0]}-{point[1]}" for point in points}
    saving = Run(case)
    saving.save(folder / "0-0")
    saving.train(saves)
    assert saving.steps == expected.steps, "a save moved something"
    for point in points:
        checkpoint = folder / f"{point[0]}-{point[1]}"
        resumed = Run(case, seed=1000)
        if case.way == "live":
            resumed.back_to = checkpoint
        else:
            resumed.load(checkpoint)
        if case.way == "chained":
            resumed.save(folder / "chained")
            resumed = Run(case, seed=1001).load(folder / "chained")
        resumed.disturb().train()
        assert resumed.steps == behind(expected.steps, point), f"resumed at {point}: {case}"
        assert resumed.rng.fingerprint() == expected.rng.fingerprint(), f"at {point}: {case}"
