"""A loader's batches, each on streams of its own, so that none depends on what else draws."""

from __future__ import annotations

import copy
import itertools
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.generators import GeneratorSet, LentGenerators, can_be_registered, source_of
from nemo_rng_dcp.parts import parts_of
from nemo_rng_dcp.position import UNKNOWN, Position
from nemo_rng_dcp.rank_streams import RankStreams
from nemo_rng_dcp.record import fingerprint
from nemo_rng_dcp.seeding import derive_seed, derive_seeds

_Result = TypeVar("_Result")


class Fetcher:
    """Makes the batches of one loader, for one row; nothing here communicates.

    While the loader runs, Python's, NumPy's and torch CPU's global generators, those that the job
    registered, and those that are found inside of the loader are on streams of its own. They start
    anew from a seed at each batch. Afterwards every generator is where it was.

    Args:
        loader: Iterable, any number of times.
        generators: Of the job.
        streams: Of the job; told while generators are lent to the loader.
        ranked: Whether the rows of the job draw different numbers.

    Attributes:
        order: Where the generators of the samplers are, and those that all ranks share, as a
            number. Ranks on which they were alike when this object was made draw one order, and
            others do not.
        checks: Of what the sampler gave for the batches of this pass, up to a number: for those
            that were fetched, and those that may be next.
    """

    def __init__(
        self, loader: Any, generators: GeneratorSet, streams: RankStreams, ranked: bool
    ) -> None:
        self._loader, self._of_job = loader, generators
        self._streams, self._ranked = streams, ranked
        self._seeds_itself = _has_sampler(loader)
        self._lend()
        packed = self._generators.pack(self._generators.take())
        states = [packed[name] for name in sorted(packed) if self._is_of_order(name)]
        self.order = int(fingerprint(b"".join(states)), 16)
        self.checks: dict[int, int] = {}

    def begin(self, position: Position) -> None:
        """Begin the pass of a position, behind what was fetched in it; moves no stream.

        Raises:
            RNGStateError: The loader ended before that, or its sampler gave other indices.
        """
        self._lend()  # a dataset's set_epoch() may have made another one
        self._is_first = True
        self._bases = {name: self._base(name, position) for name in self._generators.names}
        skip, loader = position.fetched, self._loader
        # Where the order comes from a sampler, the next index can be had without the batch. A
        # worker is another matter: it may keep what only its own batches have moved.
        jump = skip if self._seeds_itself and loader.num_workers == 0 else 0
        if self._seeds_itself:
            loader = _with_indices(loader, lambda given: self._behind(given, position, jump))
        self._iterator = self._apart(lambda: iter(loader), 0)
        for number in range(jump + 1, skip + 1):
            try:
                self.fetch(number)
            except StopIteration:
                raise _ended(number - 1, skip) from None
            except RNGStateError:
                raise
            except Exception:
                pass  # a sample that could not be read then either

    def fetch(self, number: int) -> Any:
        """Return the next batch; moves no stream.

        Args:
            number: Of the batch in this pass, from 1.

        Raises:
            StopIteration: The pass is over.
            Exception: What the loader raises.
        """
        self.checks.pop(number - 2, None)
        at = None if self._seeds_itself else number
        batch = self._apart(lambda: next(self._iterator), at)
        if self._is_first:
            self._is_first = False
            for name in self._find_generators().keys() - self._own.keys():
                warn(
                    f"{name.removeprefix('_')} is a generator that was made while a batch was "
                    "made: a resumed job makes it at another batch, and what it draws differs. "
                    "Make it before, in __init__() or in set_epoch()."
                )
        return batch

    def end(self) -> None:
        """Let go of the loader's iterator, and thereby of its workers."""
        self._iterator = iter(())
        self.checks = {}

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers and dataset, those that have ``set_epoch``."""
        for part in self._with_epoch:
            part.set_epoch(epoch)

    def _lend(self) -> None:
        self._own = self._find_generators()
        self._generators = LentGenerators(self._of_job, self._own)

    def _find_generators(self) -> dict[str, Any]:
        names = self._of_job.names_by_source
        own: dict[str, Any] = {}
        self._of_samplers = set[str]()
        self._with_epoch = []
        for part in parts_of(self._loader):
            if part.is_told and hasattr(part.value, "set_epoch"):
                self._with_epoch.append(part.value)
            for inner in part.inside():
                if not can_be_registered(inner.value):
                    continue
                name = names.setdefault(source_of(inner.value), inner.name)
                if name == inner.name:
                    own[name] = inner.value
                if not part.is_data:
                    self._of_samplers.add(name)
        return own

    def _is_of_order(self, name: str) -> bool:
        shared = name in self._generators.shared
        return shared or name.partition(".")[0] in self._of_samplers

    def _base(self, name: str, position: Position) -> int:
        """Return what the seeds of a generator are made from in the pass of a position."""
        seed, row = position.seed, [position.row]
        if self._is_of_order(name):
            seed, row = position.order, []
        elif not self._ranked and name not in self._generators.of_rank:
            row = []
        return derive_seed(seed, position.epoch, position.begun_again, name, *row, bits=64)

    def _start(self, number: int) -> None:
        # 32 bits are what NumPy and torch seed from in 2 us, and not in 150. The seed of a pass's
        # workers is drawn from all 64.
        bits = 32 if number else 64
        self._generators.start(derive_seeds(self._bases, number, bits=bits))

    def _apart(self, function: Callable[[], _Result], number: int | None) -> _Result:
        """Call a function on the streams of a batch, and put back those of the job."""
        streams, before = self._streams, self._generators.take()
        outside, streams.lent = streams.lent, streams.lent or before
        try:
            if number is not None:
                self._start(number)
            return function()
        finally:
            self._generators.put_back(before)
            streams.lent = outside

    def _behind(self, given: Iterable[Any], position: Position, jump: int) -> Iterator[Any]:
        """Return an iterator of what a sampler gives behind the first ``jump``."""
        indices = self._indices(given, position)
        for _ in range(jump):
            next(indices)
        return indices

    def _indices(self, given: Iterable[Any], position: Position) -> Iterator[Any]:
        """Yield what a sampler gives, each from the streams of its batch.

        A batch that is made in this process then goes on with the streams where the sampler left
        them. So an order is the same with and without workers, which ask for it in advance.
        """
        self._start(1)
        iterator, check = iter(given), 0
        for number in itertools.count(1):
            if number > 1:
                self._start(number)
            try:
                index = next(iterator)
            except StopIteration:
                if number <= position.fetched:
                    raise _ended(number - 1, position.fetched) from None
                return
            check = _check_of(index, check)
            if number == position.fetched and position.indices not in (check, UNKNOWN):
                raise _other_indices(number)
            if number > position.fetched:
                self.checks[number] = check
            yield index


class _Indices:
    """Stands in for a sampler: a function that gives its iterator."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()


def _has_sampler(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def _with_indices(
    loader: Any, through: Callable[[Iterable[Any]], Iterator[Any]]
) -> DataLoader[Any]:
    """Return a copy of a loader that takes its indices through a function."""
    twin: DataLoader[Any] = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    indices = getattr(loader, name)
    # DataLoader refuses to exchange them, for its own checks would be passed by.
    object.__setattr__(twin, name, _Indices(lambda: through(indices)))
    return twin


def _check_of(index: Any, before: int) -> int:
    """Return a check of the indices of a batch and of those before it."""
    try:
        return zlib.crc32(array("q", index if hasattr(index, "__len__") else [index]), before)
    except (TypeError, OverflowError):
        return before  # the text of other objects may differ from process to process


def _ended(number: int, skip: int) -> RNGStateError:
    return RNGStateError(
        f"the loader ended after {number} batches, and {skip} of this pass were handed out before "
        "the checkpoint: it is not the loader that was saved. Give it the same dataset and sampler."
    )


def _other_indices(skip: int) -> RNGStateError:
    return RNGStateError(
        f"the sampler gave other indices for the {skip} batches that were handed out before the "
        "checkpoint: it has another seed or epoch, or the order of a pass depends on the passes "
        "before it. The next batch would be other samples. Give it what the saved one had, or load "
        "without the loader and call set_epoch(), which begins an epoch anew."
    )
