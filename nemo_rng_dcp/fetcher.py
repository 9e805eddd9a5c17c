"""A loader's batches, each on streams of its own, so that none depends on what else draws."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import GeneratorSet, LentGenerators, can_be_registered, source_of
from nemo_rng_dcp.position import Position
from nemo_rng_dcp.rank_streams import RankStreams
from nemo_rng_dcp.record import fingerprint
from nemo_rng_dcp.seeding import derive_seed

_Result = TypeVar("_Result")


class Fetcher:
    """Makes the batches of one loader, for one row; nothing here communicates.

    While the loader runs, Python's, NumPy's and torch CPU's global generators, those that the job
    registered, and those that the loader, its samplers, its dataset and its ``collate_fn`` have as
    attributes are on streams of its own. They start anew from a seed at each batch. Afterwards
    every generator is where it was.

    Args:
        loader: Iterable, any number of times.
        generators: Of the job.
        streams: Of the job; told while generators are lent to the loader.
        ranked: Whether the rows of the job draw different numbers.

    Attributes:
        order: Which generators the samplers have, as a number. Ranks whose samplers' generators
            were alike when this object was made draw one order, and others do not.
    """

    def __init__(
        self, loader: Any, generators: GeneratorSet, streams: RankStreams, ranked: bool
    ) -> None:
        self._loader, self._streams, self._ranked = loader, streams, ranked
        parts = list(_parts(loader))
        self._with_epoch = [p.value for p in parts if hasattr(p.value, "set_epoch")]
        names = generators.names_by_source
        own: dict[str, Any] = {}
        self._of_samplers = set[str]()
        for part in parts:
            for attribute, generator in part.generators():
                source = source_of(generator)
                if source not in names:
                    names[source] = f"_{part.name}_{attribute}"
                    own[names[source]] = generator
                if not part.is_data:
                    self._of_samplers.add(names[source])
        self._own = own.keys()
        self._generators = LentGenerators(generators, own)
        packed = self._generators.pack(self._generators.take())
        states = [packed[name] for name in sorted(self._of_samplers)]
        self.order = int(fingerprint(b"".join(states)), 16)

    def begin(self, position: Position) -> None:
        """Begin the pass of a position, behind what was fetched in it; moves no stream.

        Raises:
            RNGStateError: The loader ended before that.
        """
        self._bases = {
            name: derive_seed(
                position.seed, position.epoch, position.begun_again, name, *owner, bits=64
            )
            for name, owner in self._owners(position).items()
        }
        skip = position.fetched
        loader = self._loader
        # Where the order comes from a sampler, the next index can be had without the batch. A
        # worker is another matter: it may keep what only its own batches have moved.
        self._seeds_itself = _has_sampler(loader)
        jump = skip if self._seeds_itself and loader.num_workers == 0 else 0
        if self._seeds_itself:
            loader = _with_indices(loader, lambda indices: self._indices(indices, jump))
        self._iterator = self._apart(lambda: iter(loader), 0)
        for number in range(jump + 1, skip + 1):
            try:
                self.fetch(number)
            except StopIteration:
                raise _ended(number - 1, skip) from None
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
        return self._apart(lambda: next(self._iterator), None if self._seeds_itself else number)

    def end(self) -> None:
        """Let go of the loader's iterator, and thereby of its workers."""
        self._iterator = iter(())

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers and dataset, those that have ``set_epoch``."""
        for part in self._with_epoch:
            part.set_epoch(epoch)

    def _owners(self, position: Position) -> dict[str, tuple[int, ...]]:
        """Return for each generator what tells its streams apart, beside the pass and the name."""
        of_row = (position.row,)
        of_rank = of_row if self._ranked else ()
        owners: dict[str, tuple[int, ...]] = {}
        for name, slot in self._generators.slots.items():
            generator = name.partition(".")[0]
            if slot.shared:
                owners[name] = ()
            elif generator in self._of_samplers:
                owners[name] = (position.order,)
            else:
                owners[name] = of_rank if slot.is_global or generator in self._own else of_row
        return owners

    def _start(self, number: int) -> None:
        # 32 bits are what NumPy and torch seed from in 2 us, and not in 150. The seed of a pass's
        # workers is drawn from all 64.
        bits = 32 if number else 64
        self._generators.start(
            {name: derive_seed(base, number, bits=bits) for name, base in self._bases.items()}
        )

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

    def _indices(self, indices: Iterable[Any], jump: int) -> Iterator[Any]:
        """Yield what a sampler yields behind the first ``jump``, from the streams of each batch.

        A batch that is made in this process then goes on with the streams where the sampler left
        them. So an order is the same with and without workers, which ask for it in advance.
        """
        self._start(1)
        iterator = iter(indices)
        for number in itertools.count(1):
            if number > 1:
                self._start(number)
            try:
                index = next(iterator)
            except StopIteration:
                if number <= jump:
                    raise _ended(number - 1, jump) from None
                return
            if number > jump:
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


class _Part(NamedTuple):
    """An object that a loader's batches come from.

    Attributes:
        name: The attributes that lead to it.
        value: The object.
        is_data: Whether it makes samples or batches, and not their order.
    """

    name: str
    value: Any
    is_data: bool

    def generators(self) -> Iterator[tuple[str, Any]]:
        for attribute, value in getattr(self.value, "__dict__", {}).items():
            if can_be_registered(value):
                yield attribute, value


def _parts(loader: Any) -> Iterator[_Part]:
    """Yield a loader, and the loaders, samplers, datasets and ``collate_fn`` inside of it."""
    seen: list[Any] = []
    waiting = [_Part("loader", loader, False)]
    while waiting:
        part = waiting.pop(0)
        if any(part.value is other for other in seen):
            continue
        seen.append(part.value)
        yield part
        for attribute, value in getattr(part.value, "__dict__", {}).items():
            is_data = attribute == "collate_fn" or isinstance(value, Dataset)
            # A sampler or a dataset may be of any class.
            by_name = attribute in ("sampler", "batch_sampler", "dataset") and value is not None
            if is_data or by_name or isinstance(value, (DataLoader, Sampler)):
                is_data = part.is_data or is_data or attribute == "dataset"
                waiting.append(_Part(f"{part.name}_{attribute}", value, is_data))


def _ended(number: int, skip: int) -> RNGStateError:
    return RNGStateError(
        f"the loader ended after {number} batches, and {skip} of this pass were handed out before "
        "the checkpoint: it is not the loader that was saved. Give it the same dataset and sampler."
    )
