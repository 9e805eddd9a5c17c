"""ResumableLoader in one process: every resume is the uninterrupted run."""

import functools
import gc
import itertools
import multiprocessing
import os
import random
import re
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from nemo_rng_dcp import (
    ResumableLoader,
    RNGLoadPlanner,
    RNGStateError,
    RNGStateWarning,
    ScopedRNG,
    StatefulRNG,
    derive_seed,
    unread,
)
from nemo_rng_dcp.fetcher import Fetcher
from nemo_rng_dcp.parts import parts_of
from nemo_rng_dcp.position import UNKNOWN, positions_in
from tests.support import jobs
from tests.support.loaders import (
    EPOCHS,
    ORDERS,
    SAMPLES,
    WAYS,
    Case,
    Drawing,
    NoisyCollate,
    OwnGenerator,
    Run,
    Shuffled,
    behind,
    check_resumes,
    loader_of,
)
from tests.support.streams import draw, needs_seed_sequences, states, unmoved, warned

EVERYWHERE: list[Any] = [(0, 0), (0, 1), (0, 2), (0, "last"), (0, "end"), (1, 2), (1, "end")]

WORKERS, PLACES = (0, 1, 2, 4), ("", "sample", "collate", "sample, collate")

# A run with workers takes half a second. Here each way meets each number of workers, with each
# order in turn; `make fuzz` has them all.
PAIRS = [
    Case(ORDERS[number % len(ORDERS)], workers, PLACES[(number + workers) % 4], way)
    for number, (way, workers) in enumerate(itertools.product(WAYS, WORKERS))
]
IN_FULL = os.environ.get("FUZZ_LOADERS") is not None
PRODUCT = [
    *itertools.starmap(Case, itertools.product(ORDERS, WORKERS, PLACES)),
    *itertools.starmap(Case, itertools.product(ORDERS, (0, 2), PLACES[3:], WAYS[1:])),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    # A resumed run has another one, to show that it does not matter.
    pytest.mark.filterwarnings("ignore:RNG state. saved with seed=.*:UserWarning"),
]


@pytest.mark.parametrize("case", [Case(order) for order in ORDERS], ids=str)
def test_a_resume_is_the_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    check_resumes(case, tmp_path, EVERYWHERE)


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_a_resume_in_pairs_of_combinations(case: Case, tmp_path: Path) -> None:
    check_resumes(case, tmp_path, [(0, 2), (1, 1) if case.way == "live" else (1, "end")])


@pytest.mark.parametrize("case", PRODUCT if IN_FULL else [], ids=str)
def test_a_resume_in_every_combination(case: Case, tmp_path: Path) -> None:
    # A live loop that goes back to the end of an epoch has begun the next one already.
    within = [(0, 2), (0, "last"), (1, 2)]
    check_resumes(case, tmp_path, within if case.way == "live" else EVERYWHERE)


# A spawned worker imports torch, which takes seconds; the fork server has imported it.
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_that_are_no_forks(method: str, tmp_path: Path) -> None:
    jobs.preload()
    case = Case("shuffle", 1, "sample")
    loader = loader_of("shuffle", 1, "sample", {}, multiprocessing_context=method)
    expected = Run(case).train({(0, 2): tmp_path}, until=(0, "end")).steps
    resumed = Run(case, seed=7, loader=loader).load(tmp_path).disturb()
    # To the end, where the worker ends: one that is left is waited for, for 5 s.
    assert resumed.train(until=(0, "end")).steps == behind(expected, (0, 2))


@pytest.mark.parametrize("way", WAYS[1:])
def test_every_way_resumes_everywhere(way: str, tmp_path: Path) -> None:
    test_a_resume_in_every_combination(Case("shuffle", way=way), tmp_path)


def test_a_checkpoint_resumes_twice_and_a_resume_resumes(tmp_path: Path) -> None:
    case, first, second, third = Case("shuffle"), *(tmp_path / name for name in "abc")
    expected = Run(case).train({(0, 1): first}).steps
    for _ in range(2):
        again = Run(case).load(first)
        again.save(second)  # right after the load
        assert again.disturb().train({(0, 3): third}).steps == behind(expected, (0, 1))
        assert Run(case).load(second).disturb().train().steps == behind(expected, (0, 1))
        assert Run(case).load(third).disturb().train().steps == behind(expected, (0, 3))


def test_a_checkpoint_that_is_written_in_the_background(tmp_path: Path) -> None:
    case = Case("shuffle")
    run = Run(case)
    batches = iter(run.loader)
    next(batches), run.draw()
    writing: Any = dcp.async_save(run.state, checkpoint_id=tmp_path)
    expected = [(batch, run.draw()) for batch in batches]
    writing.result()
    run = Run(case).load(tmp_path).disturb()
    assert [(batch, run.draw()) for batch in run.loader] == expected


def test_a_load_moves_the_loop_that_is_under_way(tmp_path: Path) -> None:
    """A job that goes back to its last checkpoint, after a spike for example."""
    case = Case("shuffle")
    expected = Run(case).train({(0, 2): tmp_path}).steps
    for back in [(0, 2), (0, 3), (0, 4), (1, 1), (1, 3)]:
        run, moved = Run(case), 0
        for epoch in run.loader.epochs(2):
            run.draw()
            for batch in run.loader:
                run.steps.append((epoch, run.loader.batches, batch, run.draw()))
                if (epoch, run.loader.batches) == back and moved < 2:
                    moved += 1
                    run.load(tmp_path).disturb()
                    run.steps.clear()
        assert [step[1:] for step in run.steps] == [s[1:] for s in behind(expected, (0, 2))], back


def pair(rng: StatefulRNG) -> list[ResumableLoader]:
    return [
        ResumableLoader(loader_of(order, 0, "sample", {}), rng) for order in ("shuffle", "lazy")
    ]


def zipped(rng: StatefulRNG, loaders: list[ResumableLoader], save: Path | None) -> list[Any]:
    steps = []
    for number, batches in enumerate(zip(*loaders, strict=True), start=1):
        steps.append((batches, draw()))
        if save is not None and number == 2:
            dcp.save({"b": rng, "a": loaders[0], "c": loaders[1]}, checkpoint_id=save)
            steps.clear()
    return steps


def test_two_loaders_in_one_loop(tmp_path: Path) -> None:
    rng = StatefulRNG(1, ranked=True)
    expected = zipped(rng, pair(rng), tmp_path)
    rng = StatefulRNG(2, ranked=True)
    loaders = pair(rng)
    dcp.load({"b": rng, "a": loaders[0], "c": loaders[1]}, checkpoint_id=tmp_path)
    draw()
    assert zipped(rng, loaders, None) == expected
    assert len(expected) == 2


def test_one_loader_after_the_other_rewinds_once(tmp_path: Path) -> None:
    """A second loader that is first asked for a batch later must not rewind again."""

    def run(rng: StatefulRNG, resumed: bool) -> list[Any]:
        loaders = pair(rng)
        state = {"rng": rng, "first": loaders[0], "second": loaders[1]}
        first, second = map(iter, loaders)
        if resumed:
            dcp.load(state, checkpoint_id=tmp_path)
        else:
            next(first), next(second)
            dcp.save(state, checkpoint_id=tmp_path)
        steps = [(next(first), draw()), (next(first), draw())]
        return [*steps, (next(second), draw())]

    expected = run(StatefulRNG(1), resumed=False)
    assert run(StatefulRNG(2), resumed=True) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_skipped(workers: int, tmp_path: Path) -> None:
    def batches_of(run: Run, save: Path | None) -> list[Any]:
        steps: list[Any] = []
        batches = iter(run.loader)
        while True:
            try:
                steps.append((next(batches), run.draw()))
            except OSError:
                steps.append("bad")
            except StopIteration:
                return steps
            if save is not None and len(steps) == 5:
                run.save(save)
                steps.clear()

    def run_of(seed: int) -> Run:
        loader = DataLoader(
            Drawing(bad=3),
            shuffle=True,
            num_workers=workers,
            collate_fn=NoisyCollate(True),
        )
        return Run(Case("shuffle"), seed, loader=loader)

    saved = run_of(1)
    expected = batches_of(saved, tmp_path)
    resumed = run_of(2).load(tmp_path).disturb()
    assert resumed.loader.batches == (5 if "bad" in expected else 4)
    assert batches_of(resumed, None) == expected


def test_going_on_without_workers_reads_no_batch(tmp_path: Path) -> None:
    class Counting(Drawing):
        read = 0

        def __getitem__(self, index: int) -> list[float]:
            self.read += 1
            return super().__getitem__(index)

    case, dataset = Case("shuffle"), Counting()
    expected = Run(case, loader=DataLoader(dataset, 2, True)).train({(0, 3): tmp_path}).steps
    dataset.read = 0
    resumed = Run(case, loader=DataLoader(dataset, 2, True)).load(tmp_path).train(until=(0, 4))
    assert dataset.read == SAMPLES % 2
    assert repr(resumed.steps) == repr(behind(expected, (0, 3))[:1])


def test_batches_move_nothing_and_depend_on_nothing_else() -> None:
    rng = StatefulRNG(1)
    loader = ResumableLoader(loader_of("shuffle", 0, "sample, collate", {}), rng)
    with unmoved():
        first = list(loader)
    rng = StatefulRNG(1)
    loader = ResumableLoader(loader_of("shuffle", 0, "sample, collate", {}), rng)
    second = []
    for batch in loader:
        second.append(batch)
        draw()
    assert first == second
    assert list(loader) != first


def test_a_batch_that_fails_moves_nothing() -> None:
    loader = ResumableLoader(DataLoader(Drawing(bad=0), batch_size=1), StatefulRNG(1))
    with unmoved(), pytest.raises(OSError, match="cannot be read"):
        next(iter(loader))


class Meddling(Drawing):
    """Samples that do with NumPy's global generator all that one can."""

    def __init__(self) -> None:
        super().__init__()
        self.bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
        self.other = np.random.RandomState(5)
        self.other.standard_normal()

    def __getitem__(self, index: int) -> list[float]:
        if index % 4 == 0:
            np.random.seed(index)
        if index % 4 == 1:
            np.random.set_state(self.other.get_state())
        if index % 4 == 2:
            np.random.mtrand._rand.standard_normal()
        return [*super().__getitem__(index), np.random.Generator(self.bits).random()]


def test_batches_leave_numpys_cached_normals_where_they_were() -> None:
    """Also one that was set back by hand, with which no word has moved."""
    np.random.seed(1)
    np.random.standard_normal()
    for cached in (True, False, True):
        with_one = np.random.get_state(legacy=False)
        assert with_one["has_gauss"] == 1
        if not cached:
            np.random.standard_normal()
        expected: Any = np.random.get_state()
        for _ in ResumableLoader(DataLoader(Meddling(), batch_size=1), StatefulRNG(None)):
            found: Any = np.random.get_state()
            assert (found[1].tolist(), found[2:]) == (expected[1].tolist(), expected[2:])
            if not cached:
                np.random.set_state(with_one)
                expected, cached = np.random.get_state(), True
        np.random.set_state(with_one)


def test_the_default_device_does_not_matter(tmp_path: Path) -> None:
    run = Run(Case("shuffle")).train(until=(0, 2))
    with torch.device("meta"):
        run.save(tmp_path)
        Run(Case("shuffle")).load(tmp_path)
    again = Run(Case("shuffle")).load(tmp_path)
    assert (again.loader.epoch, again.loader.batches) == (0, 2)


def test_two_loaders_of_one_job_draw_other_numbers() -> None:
    rng = StatefulRNG(1)
    first, second = (ResumableLoader(Shuffled(True), rng) for _ in range(2))
    assert list(first) != list(second)


class Beginning:
    """Draws where a pass begins, and for each batch."""

    passes = 0

    def __iter__(self) -> Iterator[list[list[float]]]:
        self.passes += 1
        begun = draw()
        return ([begun, draw()] for _ in range(2))


def test_the_begin_of_a_pass_draws_other_numbers_than_its_batches() -> None:
    beginning = Beginning()
    [(begun, first), (_, second)] = ResumableLoader(beginning, StatefulRNG(1))
    assert len({*begun, *first, *second}) == 3 * len(draw())
    assert beginning.passes == 1


def orders_of_ranks(generators: list[torch.Generator]) -> list[list[Any]]:
    """The orders on two ranks whose samplers have these generators."""
    return [
        list(ResumableLoader(DataLoader(range(40), 40, True, generator=generator), rng))
        for rng, generator in zip([StatefulRNG(1), StatefulRNG(2)], generators, strict=True)
    ]


class Collating:
    def __init__(self) -> None:
        self.noise = random.Random(1)

    def collate(self, samples: list[int]) -> list[int]:
        return samples


def test_a_generator_of_what_collates_is_found_and_not_taken_for_a_samplers() -> None:
    collating = Collating()
    loader = DataLoader(range(3), collate_fn=collating.collate)  # type: ignore[arg-type]
    [part] = (part for part in parts_of(loader) if part.value is collating.noise)
    assert part == ("_loader_collate_fn_self_noise", collating.noise, True, False)


def test_a_list_of_more_than_100_is_not_looked_into() -> None:
    generator = random.Random(1)
    for count, inside in ((100, [generator]), (101, [])):
        _, *found = (part.value for part in parts_of([generator] * count))
        assert found == inside


def test_no_more_than_2000_parts_are_looked_at() -> None:
    assert len([*parts_of([[object() for _ in range(100)] for _ in range(30)])]) == 2_000


def test_what_functions_and_dicts_were_made_with_is_found() -> None:
    """Under names that are identifiers, whatever an attribute is called."""
    kept = [random.Random(number) for number in range(5)]
    default, closure, positional, keyword, attribute = kept

    def collate(samples: Any, noise: Any = default) -> Any:
        return samples, noise, closure, defined_later

    made = {"a": functools.partial(collate, positional, noise=keyword)}
    named = types.SimpleNamespace(**{"no identifier": attribute})
    found = [*parts_of([made, named])]
    defined_later = 0
    assert {id(part.value) for part in found} >= {id(generator) for generator in kept}
    assert all(part.name.isidentifier() for part in found)
    assert len({part.name for part in found}) == len(found)


def test_samplers_whose_generators_are_alike_draw_one_order() -> None:
    first, second = orders_of_ranks([torch.Generator().manual_seed(3) for _ in range(2)])
    assert torch.equal(first[0], second[0])
    first, second = orders_of_ranks([torch.Generator().manual_seed(3 + n) for n in range(2)])
    assert not torch.equal(first[0], second[0])


def test_the_order_of_a_samplers_generator_is_the_saved_one() -> None:
    rng = StatefulRNG(1)
    saved, loader = (
        ResumableLoader(DataLoader(range(9), None, True, generator=generator), rng)  # type: ignore[arg-type]
        for generator in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(4))
    )
    batches = iter(saved)
    next(batches)
    rng.load_state_dict(rng.state_dict())
    loader.load_state_dict(saved.state_dict())
    assert list(loader) == list(batches)


def test_another_number_of_workers_warns_and_keeps_the_order(tmp_path: Path) -> None:
    for order in ("shuffle", "lazy", "loader's own"):
        expected = Run(Case(order, 0, "")).train({(0, 2): tmp_path}).steps
        run = Run(Case(order, 2, ""), seed=9)
        with pytest.warns(
            RNGStateWarning, match=r"with 0 workers and goes on with 2: .* differs\.$"
        ):
            run.load(tmp_path)
        assert run.train().steps == behind(expected, (0, 2))


def test_epochs_and_batches_are_counted() -> None:
    loader = ResumableLoader(DataLoader(range(3)), StatefulRNG(1), batches_per_epoch=2)
    seen = [(epoch, loader.epoch, loader.batches) for epoch in loader.epochs(2) for _ in loader]
    assert seen == [(0, 0, 1), (0, 0, 2), (1, 1, 1), (1, 1, 2)]
    assert (loader.epoch, loader.batches, len(loader)) == (2, 0, 2)
    assert not list(loader.epochs(2))
    assert loader.dataset == range(3)


class Told:
    """Notes the epochs that it is told."""

    def __init__(self, *inner: Any) -> None:
        self.epochs: list[int] = []
        self.sampler = inner[0] if inner else None

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sampler or [])

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


def test_every_part_is_told_the_epoch_and_who_speaks_last_is_heard() -> None:
    sampler, dataset = Told(range(SAMPLES)), Told()
    batch_sampler = Told(sampler)
    batch_sampler.__class__ = type("B", (Told,), {"__iter__": lambda s: iter([[0], [1]])})
    loader = ResumableLoader(DataLoader(dataset, batch_sampler=batch_sampler), StatefulRNG(1))  # type: ignore[arg-type]
    helper = dataset.helper = Told()  # type: ignore[attr-defined]
    for part in (sampler, batch_sampler, dataset):
        assert part.epochs == [], "the user may have told it another one before"
    for epoch in loader.epochs(2):
        sampler.set_epoch(100 + epoch)
        list(loader)
    loader.set_epoch(5)
    assert sampler.epochs == [100, 1, 101, 2, 5]
    assert batch_sampler.epochs == dataset.epochs == [1, 2, 5]
    assert helper.epochs == [], "the dataset tells what it keeps, if it has to know"


@pytest.mark.filterwarnings("ignore:the loader's pass of epoch 0 was left")
def test_an_epoch_can_be_set() -> None:
    loader = ResumableLoader(DataLoader(range(40), 20, True), StatefulRNG(1))
    orders = [next(iter(loader)).tolist()]
    for epoch in (0, 1, 2, 1):
        loader.set_epoch(epoch)
        orders += [batch.tolist() for batch in loader][:1]
    assert orders[0] != orders[1], "begun anew"
    assert orders[2] == orders[4]
    assert len({str(order) for order in orders}) == 4
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="expected an integer of at least 0"):
            loader.set_epoch(wrong)  # type: ignore[arg-type]


def test_setting_the_epoch_ends_the_pass_under_way() -> None:
    loader = ResumableLoader(DataLoader(range(4)), StatefulRNG(1))
    seen = []
    for batch in loader:
        seen.append(batch.item())
        loader.set_epoch(1)
    assert seen == [0]
    assert loader.epoch == 1
    batches = iter(loader)
    loader.set_epoch(2)
    assert list(batches) == [0, 1, 2, 3], "it had not begun"


def test_a_pass_that_was_left_is_said_once() -> None:
    loader = ResumableLoader(DataLoader(range(4)), StatefulRNG(1))
    next(iter(loader))

    def leave() -> None:
        for _ in range(2):
            next(iter(loader))

    (message,) = warned(leave)
    assert "pass of epoch 0 was left behind batch 1, and epoch 0 begins anew" in message
    assert "batches_per_epoch=" in message


def test_a_loop_over_epochs_says_once_that_passes_are_left() -> None:
    for batches, messages in ((4, 1), (1, 0)):
        loader = ResumableLoader(DataLoader(range(batches)), StatefulRNG(1))

        def leave(loader: Any = loader) -> None:
            for _ in loader.epochs(3):
                next(iter(loader))

        found = warned(leave)
        assert len(found) == messages
        assert all("left behind batch 1, and the next epoch begins" in text for text in found)
        assert (loader.epoch, loader.batches) == (3, 0)


def test_an_epoch_without_a_pass_is_counted_and_nothing_is_said() -> None:
    loader = ResumableLoader(DataLoader(range(4)), StatefulRNG(1))
    assert warned(lambda: list(loader.epochs(3))) == []
    assert loader.epoch == 3


def test_a_pass_without_a_batch_is_one_pass() -> None:
    loader = ResumableLoader([], StatefulRNG(1))
    assert (list(loader), loader.epoch, list(loader), loader.epoch) == ([], 1, [], 2)


def test_a_loop_over_epochs_rewinds_where_the_checkpoint_has_no_position(tmp_path: Path) -> None:
    loader = ResumableLoader(DataLoader(range(4)), rng := StatefulRNG(1))
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = draw()
    state = {"rng": rng, "loader": loader}
    with pytest.warns(RNGStateWarning, match="holds no loader_position"):
        dcp.load(state, checkpoint_id=tmp_path, planner=RNGLoadPlanner())
    draw()
    next(loader.epochs(1))
    assert draw() == expected


def test_a_loop_over_epochs_rewinds_after_a_load_of_the_loader_alone() -> None:
    loader = ResumableLoader(DataLoader(range(4)), rng := StatefulRNG(1))
    rng.load_state_dict(rng.state_dict())
    draw()
    with unmoved():
        next(loader.epochs(1))


def test_an_older_iterator_raises() -> None:
    loader = ResumableLoader(DataLoader(range(4)), StatefulRNG(1))
    old, new = iter(loader), iter(loader)
    assert next(new) == 0
    with pytest.raises(RuntimeError, match="a newer iterator of this ResumableLoader exists"):
        next(old)
    assert next(new) == 1
    assert len(new) == 4
    assert list(new) == [2, 3]
    assert (list(new), loader.epoch) == ([], 1), "it is over, once"


def generator_function() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter([1]), "an iterator: it can be gone through once only"),
        (generator_function(), "an iterator: it can be gone through once only"),
        (generator_function, "a function, expected an iterable"),
        (3, "a int, expected an iterable"),
        (ResumableLoader([1], StatefulRNG(1)), "a ResumableLoader: wrap each loader once"),
        ({0: iter([1])}, "an iterator: it can be gone through once only"),
        (DataLoader([1], sampler=iter([0])), "sampler is an iterator"),  # type: ignore[arg-type]
        (DataLoader([1], batch_sampler=iter([[0]])), "sampler is an iterator"),  # type: ignore[arg-type]
    ],
)
def test_what_can_be_gone_through_once_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ResumableLoader(loader, StatefulRNG(1))


def test_a_loader_whose_batches_would_not_come_again_is_refused() -> None:
    rng = StatefulRNG(1)
    with pytest.raises(ValueError, match="persistent_workers=True"):
        ResumableLoader(DataLoader(range(4), num_workers=1, persistent_workers=True), rng)
    with pytest.raises(ValueError, match="in_order=False and several workers"):
        ResumableLoader(DataLoader(range(4), num_workers=2, in_order=False), rng)
    ResumableLoader(DataLoader(range(4), num_workers=1, in_order=False), rng)
    other = Beginning()
    other.num_workers = 2  # type: ignore[attr-defined]
    ResumableLoader(other, rng)  # of a library that knows no other order


def test_loaders_are_those_of_the_ranks_that_a_process_plays() -> None:
    rng, loader = StatefulRNG(1, ranked=True, logical_ranks=2), DataLoader(range(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"give \{r: DataLoader\(...\) for r in rng.ranks\}"):
        ResumableLoader(loader, rng)
    with pytest.raises(ValueError, match=r"those of ranks \[0\], expected \[0, 1\]"):
        ResumableLoader({0: loader}, rng)
    assert list(ResumableLoader({0: loader}, StatefulRNG(1))) == [{0: n} for n in range(4)]


def test_other_arguments_are_checked() -> None:
    loader = DataLoader(range(4))
    with pytest.raises(TypeError, match="rng is a int"):
        ResumableLoader(loader, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"batches_per_epoch is 1\.5"):
        ResumableLoader(loader, StatefulRNG(1), batches_per_epoch=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches_per_epoch is 0, expected at least 1"):
        ResumableLoader(loader, StatefulRNG(1), batches_per_epoch=0)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (DataLoader(range(12), 3), "batch size 2, and now it is 3"),
        (DataLoader(range(13), 2), "dataset's size 12, and now it is 13"),
        (
            DataLoader(range(12), 2, sampler=RandomSampler(range(12), num_samples=8)),
            "length 6, and now it is 4",
        ),
        (Shuffled(False), "batch size 2, and now it is none"),
    ],
)
def test_another_loader_is_refused_in_the_middle_of_an_epoch(now: Any, message: str) -> None:
    saved = ResumableLoader(DataLoader(range(12), 2), StatefulRNG(1))
    batches = iter(saved)
    next(batches)
    state = saved.state_dict()
    loader = ResumableLoader(now, StatefulRNG(1))
    with pytest.raises(RNGStateError, match=f"{message}.* set_epoch.., which begins an epoch anew"):
        loader.load_state_dict(state)
    assert loader.epoch == loader.batches == 0
    list(batches)
    loader.load_state_dict(saved.state_dict())
    assert loader.epoch == 1


def test_what_is_no_position_is_refused() -> None:
    loader = ResumableLoader(DataLoader(range(4)), StatefulRNG(1))
    with torch.device("meta"):
        (key, table), *_ = loader.state_dict().items()
    [position] = positions_in(table)
    of_row_1 = position._replace(rows=2, row=1).to_tensor()
    for wrong, message in [
        ({}, "the state is none of a ResumableLoader"),
        (None, "the state is none of a ResumableLoader"),
        ({key: 3}, "the state is none of a ResumableLoader"),
        ({key: table.float()}, "found torch.float32 (17,), expected torch.int64 (rows * 17,)"),
        ({key: table[1:]}, "found torch.int64 (16,), expected torch.int64"),
        ({key: table[:0]}, "found torch.int64 (0,), expected torch.int64"),
        ({key: position._replace(layout=2).to_tensor()}, "found layout 2, row 0 of 1"),
        ({key: position._replace(row=1).to_tensor()}, "found layout 1, row 1 of 1"),
        ({key: position._replace(row=-1).to_tensor()}, "found layout 1, row -1 of 1"),
        ({key: of_row_1}, "rows [0] were given the positions of rows [1], expected [0]"),
    ]:
        with pytest.raises(RNGStateError, match=re.escape(message)):
            loader.load_state_dict(wrong)


def test_a_save_before_the_pending_rewind_stores_what_was_loaded(tmp_path: Path) -> None:
    case, first, second = Case("shuffle"), tmp_path / "a", tmp_path / "b"
    expected = Run(case).train({(0, 2): first}).steps
    run = Run(case).load(first)
    assert warned(lambda: run.save(second)) == [], "nothing has drawn yet"
    (message,) = warned(lambda: run.disturb().save(second))
    assert "this save comes before the first batch of a ResumableLoader" in message
    assert warned(lambda: run.load(second)) == [], "a load asks for the state, too"
    assert Run(case).load(second).disturb().train().steps == behind(expected, (0, 2))
    run.load(first).loader.set_epoch(3)
    assert warned(lambda: run.disturb().save(second)) == [], "no rewind will come"


def test_a_rewind_by_hand_does_not_replace_the_loaders(tmp_path: Path) -> None:
    case = Case("shuffle")
    expected = Run(case).train({(0, 2): tmp_path}).steps
    run = Run(case).load(tmp_path)
    run.rng.rewind()
    assert run.disturb().train().steps == behind(expected, (0, 2))


def test_a_first_batch_inside_a_scope_is_said_and_the_streams_come_back(tmp_path: Path) -> None:
    case = Case("shuffle")
    expected = Run(case).train({(0, 2): tmp_path}).steps
    run = Run(case).load(tmp_path)
    loaded = run.rng.fingerprint()
    run.disturb()

    def first_batch() -> None:
        with ScopedRNG(3):
            before = states()
            batch = next(iter(run.loader))
            assert states() == before, "the scope goes on with its own streams"
            assert batch == behind(expected, (0, 2))[0][2]

    (message,) = warned(first_batch)
    assert "inside the ScopedRNG entered at" in message
    assert run.rng.fingerprint() == loaded


def test_a_save_inside_of_a_fetch_stores_the_streams_of_the_job(tmp_path: Path) -> None:
    class Saving(Drawing):
        run: Run | None = None

        def __getitem__(self, index: int) -> list[float]:
            if index == 3 and self.run is not None:
                self.run.save(tmp_path)
            return super().__getitem__(index)

    case, dataset = Case("shuffle"), Saving()
    run = Run(case, loader=DataLoader(dataset, collate_fn=list))
    dataset.run = run
    run.train(until=(0, 4))
    before = next(step for step in run.steps if step[1] == 4)
    resumed = Run(case, loader=DataLoader(Drawing(), collate_fn=list)).load(tmp_path).disturb()
    assert resumed.train(until=(0, 4)).steps == [before]


def test_a_rank_without_global_generators_has_a_loader_too(tmp_path: Path) -> None:
    def batches(save: bool) -> list[Any]:
        noise = np.random.default_rng(1)
        rng = StatefulRNG(1, generators={"noise": noise}, global_generators=False)
        loader = ResumableLoader(loader_of("lazy", 0, "sample", {}), rng)
        state = {"rng": rng, "loader": loader}
        with unmoved():
            if save:
                next(batches := iter(loader))
                dcp.save(state, checkpoint_id=tmp_path)
                return [(batch, noise.random()) for batch in batches]
            dcp.load(state, checkpoint_id=tmp_path)
            noise.random()
            return [(batch, noise.random()) for batch in loader]

    assert batches(save=True) == batches(save=False)


def test_a_generator_that_global_numpy_shares_is_no_generator_of_the_loader() -> None:
    """scikit-learn's check_random_state(None) gives NumPy's global RandomState."""
    sampler = RandomSampler(range(4), generator=torch.default_generator)
    sampler.state = np.random.mtrand._rand  # type: ignore[attr-defined]
    sampler.entropy = random.SystemRandom()  # type: ignore[attr-defined]
    loader = ResumableLoader(DataLoader(range(4), sampler=sampler), StatefulRNG(1))
    with unmoved():
        assert sorted(loader) == [0, 1, 2, 3]


def test_a_state_dict_that_is_kept_from_a_load_without_a_position_holds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = StatefulRNG(1)
    dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "without")
    loader = ResumableLoader([1, 2, 3, 4], rng)
    batches = iter(loader)
    assert [next(batches), next(batches)] == [1, 2]
    kept = {"w": torch.ones(1), "loader": loader.state_dict()}
    dcp.load(kept, checkpoint_id=tmp_path / "without", planner=RNGLoadPlanner())
    dcp.save(kept, checkpoint_id=tmp_path / "kept")
    monkeypatch.setattr(unread, "_marks", set())  # as in another process
    resumed = ResumableLoader([1, 2, 3, 4], rng)
    rng.load_state_dict(rng.state_dict())
    dcp.load({"loader": resumed}, checkpoint_id=tmp_path / "kept")
    assert list(resumed) == [3, 4]


class InPlace(Shuffled):
    """A sampler that shuffles what the pass before it left."""

    def __init__(self) -> None:
        super().__init__(False)
        self.order = list(range(SAMPLES))

    def __iter__(self) -> Iterator[Any]:
        random.shuffle(self.order)
        return iter(self.order)


def sampled(kind: str, workers: int) -> DataLoader[Any]:
    data = range(SAMPLES)
    samplers: dict[str, Any] = {
        "another seed": DistributedSampler(data, 1, 0, seed=5),  # type: ignore[arg-type]
        "no shuffle": SequentialSampler(data),
        "in place": InPlace(),
    }
    sampler = samplers.get(kind, DistributedSampler(data, 1, 0))  # type: ignore[arg-type]
    return DataLoader(range(SAMPLES), sampler=sampler, num_workers=workers)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:the loader goes on in the middle of an epoch")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["another seed", "no shuffle", "in place"])
def test_a_sampler_with_another_order_is_refused(kind: str, workers: int) -> None:
    """Its length, batch size and dataset's size are those that were saved."""
    saved = ResumableLoader(sampled("in place" if kind == "in place" else "", 0), StatefulRNG(1))
    list(saved)
    batches = iter(saved)
    for _ in range(6):
        next(batches)
    loader = ResumableLoader(sampled(kind, workers), saved._rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RNGStateWarning)  # of another number of workers
        loader.load_state_dict(saved.state_dict())
    with pytest.raises(RNGStateError, match="other indices for the 6 batches"):
        next(iter(loader))
    loader.set_epoch(2)
    assert len(list(loader)) == SAMPLES


class Ending(Sampler[int]):
    """Gives fewer indices than it says."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


class WithoutLength:
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


@pytest.mark.parametrize("kind", [Ending, WithoutLength])
def test_a_loader_that_ends_before_its_position_is_refused(kind: Any) -> None:
    rng = StatefulRNG(1)

    def loader_of(count: int) -> ResumableLoader:
        inner = kind(count)
        loader = DataLoader(range(9), None, sampler=inner) if kind is Ending else inner  # type: ignore[arg-type]
        return ResumableLoader(loader, rng)

    saved, loader = loader_of(4), loader_of(2)
    batches = iter(saved)
    for _ in range(3):
        next(batches)
    rng.load_state_dict(rng.state_dict())
    loader.load_state_dict(saved.state_dict())
    with pytest.raises(RNGStateError, match="ended after 2 batches, and 3 of this pass were"):
        next(iter(loader))


@pytest.mark.parametrize("name", ["a", 0.5, 2**70])
def test_indices_that_are_no_integers_are_not_compared(name: Any) -> None:
    rng, dataset = StatefulRNG(1), {name: 3}
    loader = ResumableLoader(DataLoader(dataset, sampler=[name] * 3), rng)  # type: ignore[arg-type]
    next(iter(loader))
    state = loader.state_dict()
    rng.load_state_dict(rng.state_dict())
    loader.load_state_dict(state)
    assert list(loader) == [3, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_goes_on_after_an_interrupt(workers: int, monkeypatch: Any) -> None:
    loader = ResumableLoader(DataLoader(range(6), 2, num_workers=workers), StatefulRNG(1))
    batches = iter(loader)
    seen = [next(batches).tolist()]
    fetch = Fetcher.fetch

    def interrupted(fetcher: Fetcher, number: int) -> Any:
        fetch(fetcher, number)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Fetcher, "fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    assert loader.batches == 1
    (position,) = positions_in(loader.state_dict()["loader_position"])
    assert position.indices != UNKNOWN, "a save in a fetch has a check, too"
    seen += [batch.tolist() for batch in batches]
    assert seen == [[0, 1], [2, 3], [4, 5]]


def test_the_workers_of_a_loader_that_is_let_go_of_end() -> None:
    """Not when the garbage collector comes, which waits 5 s for each of them."""
    gc.disable()
    try:
        others = set(multiprocessing.active_children())
        loader = ResumableLoader(DataLoader(range(4), num_workers=1), StatefulRNG(1))
        next(iter(loader))
        [worker] = set(multiprocessing.active_children()) - others
        del loader
        assert not worker.is_alive()
    finally:
        gc.enable()


def test_batches_that_another_thread_fetches_are_said() -> None:
    loader = ResumableLoader(DataLoader(range(4)), StatefulRNG(1))

    def fetch() -> None:
        for _ in range(2):
            thread = threading.Thread(target=lambda: list(loader), name="prefetch")
            thread.start()
            thread.join()

    messages = warned(fetch)
    assert "batches are fetched in another thread, prefetch" in messages[0]


def test_the_checks_of_a_long_pass_do_not_add_up() -> None:
    loader = ResumableLoader(DataLoader(range(9)), StatefulRNG(1))
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    assert list(loader._fetchers[0].checks) == [4, 5]


def test_a_generator_that_is_made_with_a_batch_is_said() -> None:
    class Late(OwnGenerator):
        def __init__(self) -> None:
            self.draws, self.bad = False, None

        def __getitem__(self, index: int) -> list[float]:
            if not hasattr(self, "noise"):
                self.noise = np.random.default_rng(3)
            return super().__getitem__(index)

    loader = ResumableLoader(DataLoader(Late()), StatefulRNG(1))
    (message,) = warned(lambda: [list(loader), list(loader)])
    assert message.startswith("loader_dataset_noise is a generator that was made while a batch w")
    assert warned(lambda: list(ResumableLoader(DataLoader(OwnGenerator()), StatefulRNG(1)))) == []


def test_a_loader_without_its_streams_is_said(tmp_path: Path) -> None:
    Run(Case("shuffle")).train({(0, 2): tmp_path}, until=(0, 2))
    run = Run(Case("shuffle"))
    dcp.load({"loader": run.loader}, checkpoint_id=tmp_path)
    (message,) = warned(lambda: next(iter(run.loader)))
    assert "nothing was loaded into its StatefulRNG" in message


class Numbers(Dataset[list[int]]):
    """Draws what Python and NumPy give for a seed in every version, and begins with a draw."""

    def __init__(self) -> None:
        self.nothing: list[Any] = []
        self.own = np.random.RandomState(3)

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> list[int]:
        numbers = random.getrandbits(30), np.random.randint(2**30), self.own.randint(2**30)
        return [index, *map(int, numbers)]

    def __iter__(self) -> Iterator[Any]:
        begun = random.getrandbits(30)
        return ([begun, self[number]] for number in range(3))


class OwnOrder(Sampler[int]):
    """Draws where a pass begins, and for each index."""

    def __init__(self) -> None:
        self.order, self.other = random.Random(5), np.random.default_rng(6)

    def __iter__(self) -> Iterator[int]:
        begun = self.order.randrange(9)
        return (-1 - (begun + self.order.randrange(9)) % 9 for _ in range(9))


BATCHES_FOR_EVER: list[list[Any]] = [
    [
        [-8, 353090442, 317744694, 671305537],
        [-6, 397507381, 594868547, 471521352],
        [-8, 948586114, 824880184, 148451116],
        [-1, 933400240, 453610836, 519848641],
        [-9, 344605453, 974873260, 591310034],
        [-7, 300143351, 752112410, 712562480],
        [-6, 273702245, 262843580, 118880364],
        *(3040408289291920402, 6637823596703274079, 616735130),
    ],
    [
        [47609407, [0, 231282766, 645926506, 605002147]],
        [47609407, [1, 524782783, 578354623, 913677949]],
        [578540378, [0, 641993471, 888151569, 948622293]],
        [578540378, [1, 221937496, 466029787, 852225224]],
        [674116993, [0, 729004870, 510860927, 466609622]],
        [349107814, [0, 623073243, 598484616, 606905282]],
        [349107814, [1, 1022123822, 733566014, 947840516]],
        *(1104025310476927040, 6379865466216535936, -1),
    ],
]
"""Of two loaders: two of each pass; one and two where a pass is begun anew; the three numbers."""


@needs_seed_sequences  # the order's seed is made from what its generators store
@pytest.mark.filterwarnings("ignore:the loader's pass of epoch 1 was left")
@pytest.mark.filterwarnings("ignore:the loader goes on in the middle of an epoch")
def test_a_loader_has_the_same_batches_for_ever() -> None:
    """A job that goes on from a checkpoint of today draws the same numbers tomorrow."""
    rng, data = StatefulRNG(1, ranked=True), Numbers()
    kinds: list[Any] = [DataLoader(data, None, sampler=OwnOrder()), data]
    for kind, expected in zip(kinds, BATCHES_FOR_EVER, strict=True):
        loader, found = ResumableLoader(kind, rng), []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            batches = iter(loader)
            found += [next(batches), next(batches)]
        found += [next(iter(loader)), next(batches := iter(loader)), next(batches)]  # begun anew
        (table,) = (state := loader.state_dict()).values()
        (position,) = positions_in(table)
        assert [*found, position.seed, position.order, position.indices] == expected
        then = next(batches)
        loader.load_state_dict(state)
        assert next(batches) == then


def test_without_a_seed_the_order_is_made_from_that_of_torch() -> None:
    def order(seed: int, own: int | None = None) -> list[Any]:
        torch.manual_seed(seed)
        rng = StatefulRNG(own)
        torch.rand(3)
        with unmoved():
            loader = ResumableLoader(DataLoader(range(40), 40, shuffle=True), rng)
            return [batch.tolist() for batch in loader]

    assert order(1) == order(1) == order(7, own=1) != order(2)


def test_without_a_seed_a_resume_has_that_of_the_checkpoint(tmp_path: Path) -> None:
    def run(seed: int) -> tuple[ResumableLoader, dict[str, Any]]:
        torch.manual_seed(seed)
        rng = StatefulRNG(None)
        loader = ResumableLoader(DataLoader(range(9), shuffle=True), rng)
        return loader, {"rng": rng, "loader": loader}

    loader, state = run(1)
    batches = iter(loader)
    next(batches)
    dcp.save(state, checkpoint_id=tmp_path)
    expected = [*batches, *loader]
    loader, state = run(2)
    dcp.load(state, checkpoint_id=tmp_path)
    assert [*loader, *loader] == expected


def test_rows_at_other_places_are_refused() -> None:
    """Two processes, each of which plays one of them, whose loaders end at other batches."""
    rng = StatefulRNG(1, ranked=True, logical_ranks=2)
    loader = ResumableLoader({r: DataLoader(range(4)) for r in rng.ranks}, rng)  # type: ignore[arg-type]
    (key, table), *_ = loader.state_dict().items()
    positions = positions_in(table)
    positions[1] = positions[1]._replace(epoch=1)
    with pytest.raises(RNGStateError, match="row 0 was saved behind batch 0 of epoch 0, and row 1"):
        loader.load_state_dict({key: torch.cat([p.to_tensor() for p in positions])})


def test_the_seeds_of_a_jobs_loaders_never_change() -> None:
    rng = StatefulRNG(1)
    loaders = [ResumableLoader(DataLoader(range(4)), rng) for _ in range(2)]
    seeds = [positions_in(loader.state_dict()["loader_position"])[0].seed for loader in loaders]
    assert seeds == [derive_seed(1, "loader", number, bits=63) for number in (1, 2)]


def test_a_limit_that_is_passed_already_ends_the_pass() -> None:
    saved = ResumableLoader(DataLoader(range(9)), StatefulRNG(1))
    batches = iter(saved)
    for _ in range(4):
        next(batches)
    loader = ResumableLoader(DataLoader(range(9)), saved._rng, batches_per_epoch=2)
    saved._rng.load_state_dict(saved._rng.state_dict())
    loader.load_state_dict(saved.state_dict())
    assert (len(list(loader)), loader.epoch, len(list(loader))) == (0, 1, 2)


def test_one_that_was_not_constructed_to_the_end_is_let_go_of() -> None:
    half = object.__new__(ResumableLoader)
    half.__del__()
    with pytest.raises(AttributeError, match="'ResumableLoader' object has no attribute 'loader'"):
        _ = half.loader


def test_another_sampler_cannot_be_set_on_it() -> None:
    loader = ResumableLoader(DataLoader(range(4)), StatefulRNG(1))
    with pytest.raises(AttributeError, match="'ResumableLoader' object has no attribute '_index_s"):
        _ = loader._index_sampler  # private names are not the loader's
    with pytest.raises(AttributeError, match="sampler"):
        loader.sampler = SequentialSampler(range(4))


# Loops that are not the user's, and have no line of ours inside.


@pytest.mark.parametrize("leave", ["by count", "by zip", "by break"])
def test_a_pass_that_is_left_behind_its_last_batch_is_complete(leave: str) -> None:
    loader = ResumableLoader(DataLoader(range(3)), StatefulRNG(1))
    seen = []
    for _ in range(3):
        if leave == "by count":
            batches = iter(loader)
            seen += [(loader.epoch, next(batches).item()) for _ in range(len(loader))]
        elif leave == "by zip":
            seen += [(loader.epoch, b.item()) for _, b in zip(range(3), loader, strict=False)]
        else:
            for batch in loader:
                seen.append((loader.epoch, batch.item()))
                if loader.batches == len(loader):
                    break
    assert seen == [(epoch, batch) for epoch in range(3) for batch in range(3)]
    loader.state_dict()
    assert loader.epoch == (2 if leave == "by count" else 3)


def test_an_epoch_that_is_left_behind_its_last_batch_is_not_said() -> None:
    loader = ResumableLoader(DataLoader(range(3)), StatefulRNG(1))

    def train() -> None:
        for _ in loader.epochs(3):
            iterator = iter(loader)  # held, as a framework does
            for _ in range(3):
                next(iterator)

    assert warned(train) == []
    assert (loader.epoch, loader.batches) == (3, 0)


def test_a_loop_that_counts_by_itself_resumes(tmp_path: Path) -> None:
    """As Lightning's: an epoch is over behind its last batch, and nobody asks for one more."""

    def train(run: Run, steps: int, start: int = 0, save: int | None = None) -> list[Any]:
        seen: list[Any] = []
        length = len(run.loader)
        epoch, batch = divmod(start, length)
        if epoch > run.loader.epoch:
            run.loader.set_epoch(epoch)  # the line behind the load, where it is of a last batch
        while len(seen) < steps - start:
            batches = iter(run.loader)
            for _ in range(batch, length):
                seen.append((run.loader.epoch, next(batches), run.draw()))
                if start + len(seen) == save:
                    run.save(tmp_path / str(save))
            batch = 0
        return seen

    case = Case("distributed")
    length = len(Run(case).loader)
    expected = train(Run(case), 3 * length)
    for save in range(1, 2 * length + 1):
        assert train(Run(case), 3 * length, save=save) == expected
        run = Run(case, seed=9).load(tmp_path / str(save))
        if save % length:
            run.disturb()
        assert train(run, 3 * length, save) == expected[save:], save


def test_a_loop_that_counts_by_itself_may_begin_behind_the_last_batch() -> None:
    saved = ResumableLoader(DataLoader(range(3)), rng := StatefulRNG(1))
    batches = iter(saved)
    for _ in range(3):
        next(batches)
    loader = ResumableLoader(DataLoader(range(3)), rng)
    loader.load_state_dict(saved.state_dict())
    iter(loader)  # of which it asks for the batches that are left: none
    assert (next(iter(loader)), loader.epoch) == (0, 1)


@pytest.mark.parametrize("spins", [False, True])
def test_a_loop_that_can_spin_its_loader_resumes(spins: bool, tmp_path: Path) -> None:
    """As Composer's, whose spin_dataloaders skips the batches of the epoch by itself."""

    def train(run: Run, at: tuple[int, int], save: tuple[int, int] | None = None) -> list[Any]:
        (start, trained), seen = at, []
        for epoch in range(start, EPOCHS):
            first = 1 if epoch > start or spins else trained + 1
            for number, batch in enumerate(run.loader, first):
                if (epoch, number) <= at:
                    continue
                seen.append((epoch, batch, run.draw()))
                if (epoch, number) == save:
                    run.save(tmp_path)
                    seen.clear()
        return seen

    case, save = Case("shuffle"), (1, 2)
    expected = train(Run(case), (0, 0), save)
    run = Run(case)
    if spins:  # It moves the loader by itself, so the loader's entry is not loaded.
        dcp.load({"rng": run.rng}, checkpoint_id=tmp_path)
        run.loader.set_epoch(save[0])
    else:
        run.load(tmp_path).disturb()
    assert train(run, save) == expected
    assert len(expected) == len(run.loader) - save[1]
