"""``ResumableLoader``: a loader that goes on behind the last batch that it handed out."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.fetcher import Fetcher
from nemo_rng_dcp.loader_entry import (
    check_that_it_goes_on,
    figures_of,
    is_unread,
    loaded_positions,
    marked_position,
    position_key,
)
from nemo_rng_dcp.parts import check_that_it_can_be_repeated
from nemo_rng_dcp.position import POSITION_KEY, POSITION_LAYOUT, UNKNOWN, Position
from nemo_rng_dcp.seeding import derive_seed, is_integer
from nemo_rng_dcp.stateful import StatefulRNG
from nemo_rng_dcp.unread import load_is_asking
from nemo_rng_dcp.versions import __version__, version_number


class ResumableLoader:
    """A loader that is an entry of the checkpoint, beside the model and the ``StatefulRNG``.

    After a ``dcp.load``, a loop over it goes on behind the last batch that was handed out before
    the save: the same order, the same draws of workers, dataset and ``collate_fn``. Before its
    first batch it puts every stream of the ``StatefulRNG`` back to where the load left it, whatever
    drew since. So nothing is to be rewound, and the loader needs no ``generator=``.

    Its batches are made on streams of its own, from a seed for each pass and batch. So they depend
    on nothing else that draws, and they draw nothing from the job's streams. The numbers are not
    those of the loader that is wrapped.

    A pass is over where the loader ends, and also where a loop leaves it behind its last batch: one
    that counts by itself, or goes through another loader beside it.

    Without workers, a resume advances the sampler and reads no batch. With workers, and for a
    loader of another kind, it goes through the batches that were handed out.

    Every rank constructs it, in the same order, and every rank of the default process group calls
    :meth:`state_dict`, as DCP does. Nothing communicates. One iterator at a time is in use: an
    older one raises.

    Args:
        loader: What can be gone through again and again: a ``DataLoader``, or another iterable.
            It is taken as it is, and may be iterated by itself as well. With ``logical_ranks`` a
            loader for each rank that this process plays, ``{r: DataLoader(...) for r in
            rng.ranks}``: a batch is ``{r: batch}`` then, of which each is used inside
            ``rng.as_rank(r)``. The pass ends where the first of them ends.
        rng: The job's. The loader's streams are made from its ``seed``; without one, from the seed
            that torch's global generator has.
        batches_per_epoch: A pass ends after as many batches, at least 1; ``None``: where the loader
            ends.

    Raises:
        TypeError: ``loader`` or its sampler can be gone through once only, is no iterable, or is a
            ResumableLoader itself; ``rng`` is no StatefulRNG; ``batches_per_epoch`` is no integer.
        ValueError: The loader has ``persistent_workers=True``, or several workers and
            ``in_order=False``; ``batches_per_epoch`` is less than 1; or the loaders are not those
            of the ranks that this process plays.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed.checkpoint as dcp
        >>> from torch.utils.data import DataLoader
        >>> from nemo_rng_dcp import StatefulRNG
        >>> rng = StatefulRNG(seed=42, ranked=True)
        >>> loader = ResumableLoader(DataLoader(range(4), shuffle=True), rng)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     batches = iter(loader)
        ...     _ = next(batches)
        ...     _ = dcp.save({"rng": rng, "loader": loader}, checkpoint_id=path)
        ...     expected = list(batches)
        ...     dcp.load({"rng": rng, "loader": loader}, checkpoint_id=path)
        >>> list(loader) == expected
        True
    """

    # What is set on it by mistake, such as another sampler, would not reach the loader.
    __slots__ = (
        *("loader", "_rng", "_by_rank", "_loaders", "_fetchers", "_limit", "_seeds", "_orders"),
        *("_epoch", "_begun_again", "_batches", "_fetched", "_loads", "_asked_at", "_is_loaded"),
        *("_iterator", "_said_left", "_thread", "__weakref__"),
    )

    def __init__(
        self, loader: Any, rng: StatefulRNG, *, batches_per_epoch: int | None = None
    ) -> None:
        if not isinstance(rng, StatefulRNG):
            raise TypeError(f"rng is a {type(rng).__name__}, expected a StatefulRNG")
        self._by_rank = isinstance(loader, Mapping)
        self._loaders = list(loader.values()) if self._by_rank else [loader]
        if self._by_rank and list(loader) != list(rng.ranks):
            raise ValueError(
                f"the loaders are those of ranks {list(loader)}, expected {list(rng.ranks)}, those "
                "that this process plays: {r: DataLoader(...) for r in rng.ranks}"
            )
        if not self._by_rank and rng.logical_ranks is not None:
            raise ValueError(
                "this is one loader, and with logical_ranks each of them has batches of its own: "
                "give {r: DataLoader(...) for r in rng.ranks}"
            )
        for one in self._loaders:
            if isinstance(one, ResumableLoader):
                raise TypeError("loader is a ResumableLoader: wrap each loader once")
            check_that_it_can_be_repeated(one)
        if batches_per_epoch is not None and not is_integer(batches_per_epoch):
            raise TypeError(f"batches_per_epoch is {batches_per_epoch!r}, expected an integer")
        if batches_per_epoch is not None and batches_per_epoch < 1:
            raise ValueError(f"batches_per_epoch is {batches_per_epoch}, expected at least 1")
        self.loader, self._rng = loader, rng
        self._limit = batches_per_epoch
        self._fetchers = [
            Fetcher(one, rng._generators, rng._streams, rng.ranked) for one in self._loaders
        ]
        rng._rewinds.loaders += 1
        seed = torch.initial_seed() if rng.seed is None else rng.seed
        # For each row: what its streams are made from, and its order where a sampler has generators
        # of its own.
        self._seeds = [self._derived(seed) for _ in self._loaders]
        self._orders = [self._derived(fetcher.order) for fetcher in self._fetchers]
        self._epoch = self._begun_again = self._batches = self._fetched = 0
        # Loads so far, and how many there were when an iterator was last asked for.
        self._loads = self._asked_at = 0
        # Loaded, and no pass was begun since.
        self._is_loaded = False
        # Weak, since one that nobody holds any more is over.
        self._iterator: weakref.ref[_Pass] | None = None
        self._said_left = False
        self._thread = threading.current_thread()

    def __del__(self) -> None:
        # The iterators refer to their fetchers. The garbage collector breaks such a circle in an
        # order in which a DataLoader no longer reaches its workers, and waits 5 s for each.
        for fetcher in getattr(self, "_fetchers", ()):
            fetcher.end()

    @property
    def epoch(self) -> int:
        """Completed passes, and so the number of the one that is next or under way, from 0."""
        return self._epoch

    @property
    def batches(self) -> int:
        """Batches handed out in this pass."""
        return self._batches

    def epochs(self, n: int) -> Iterator[int]:
        """Yield the epochs that are left of ``n``, from the current one on.

        For ``for epoch in loader.epochs(n)`` around ``for batch in loader``. After a load it begins
        with a rewind of the ``StatefulRNG``. A load inside the loop moves the loop as well. An
        epoch whose body ends before the pass is over is counted as complete.

        Args:
            n: All epochs of the training, at least 0.

        Yields:
            :attr:`epoch`.
        """
        if self._is_loaded and self._fetched == 0:
            self._rng._rewinds.rewind_for_loaders()
        while self._epoch < n:
            epoch, loads = self._epoch, self._loads
            yield epoch
            if (self._epoch, self._loads) == (epoch, loads):
                if self._fetched and not self._is_complete():
                    self._say_left("the next epoch begins")
                self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch with the next iterator; nothing happens if it is the current one.

        The loader's sampler, batch sampler and dataset are told, those that have ``set_epoch``.
        They are also told where a pass ends and where a load moves the loader. Who calls their
        ``set_epoch`` after that has the last word.

        Args:
            epoch: At least 0. An epoch that was gone through before has the same order again.

        Raises:
            ValueError: ``epoch`` is no integer of at least 0.
        """
        if not is_integer(epoch) or epoch < 0:
            raise ValueError(f"epoch is {epoch!r}, expected an integer of at least 0")
        if epoch != self._epoch:
            current = self._current()
            if current is not None:
                current.leave()
            self._move(int(epoch))

    def __iter__(self) -> _Pass:
        # A loop may end by its own count, or by the end of another loader. After a load behind the
        # last batch the first iterator gives nothing: the loop over epochs is there, too.
        self._end_if_complete()
        self._asked_at = self._loads
        iterator = _Pass(self)
        self._iterator = weakref.ref(iterator)
        return iterator

    def __len__(self) -> int:
        length = min(map(len, self._loaders))
        return length if self._limit is None else min(length, self._limit)

    def __getattr__(self, name: str) -> Any:
        """Return what the loader has under a name, such as ``dataset``."""
        if name.startswith("_") or name == "loader":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the position of this rank's row as its row of a table; moves no stream.

        Returns:
            ``{"loader_position": table}``: int64, shape ``(rows * 16,)``, a DTensor sharded on dim
            0 of which each rank has its row (a plain tensor without a process group).

        Raises:
            RuntimeError: As for ``StatefulRNG.state_dict()``.
        """
        if self._current() is None:
            self._end_if_complete()
        positions = self._positions()
        if load_is_asking():
            # If the load finds none, this is what it gives back.
            positions = [marked_position(position) for position in positions]
        rows = self._rng._rows()
        return {position_key(rows): rows.table([position.to_tensor() for position in positions])}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the position in ``state_dict``; the next batch is the one behind it.

        An iterator that is in use goes on there, too. Does not communicate.

        Args:
            state_dict: What :meth:`state_dict` gave.

        Warns:
            RNGStateWarning: The checkpoint has no position, and the loader stays where it is; or
                the pass goes on with another number of workers, and what they draw differs.

        Raises:
            RNGStateError: There is no position in it, or it is another row's; or it is in the
                middle of a pass, and the loader has another batch size, length or size of the
                dataset, or the job another number of rows, so that the next batch would be other
                samples. The loader stays where it is.
        """
        key = position_key(self._rng._rows())
        table = state_dict.get(key) if isinstance(state_dict, Mapping) else None
        if not isinstance(table, torch.Tensor):
            raise RNGStateError(f"{key}: the state is none of a ResumableLoader")
        own = self._positions()
        saved = loaded_positions(table, [position.row for position in own])
        unread = [position for position in saved if is_unread(position)]  # each is asked
        if unread:
            self._is_loaded = True
            warn(
                f"the checkpoint holds no {POSITION_KEY} for a ResumableLoader, which stays behind "
                f"batch {self._batches} of epoch {self._epoch}. The checkpoint was saved without "
                "it: move the loader with set_epoch(), and add it to what is saved."
            )
            return
        check_that_it_goes_on(saved, own)
        at = saved[0]
        self._seeds = [position.seed for position in saved]
        for number, (then, now) in enumerate(zip(saved, own, strict=True)):
            if then.row == now.row:
                self._orders[number] = then.order  # a new row has an order of its own
        self._loads += 1
        self._is_loaded = True
        self._move(at.epoch, at.batches, at.fetched, at.begun_again)
        for fetcher, position in zip(self._fetchers, saved, strict=True):
            fetcher.checks = {position.fetched: position.indices}

    def _positions(self) -> list[Position]:
        rows, now = self._rng._rows(), time.time_ns()
        return [
            Position(
                layout=POSITION_LAYOUT,
                version=version_number(__version__),
                length=len(Position._fields),
                row=row,
                rows=rows.count,
                saved_at=now,
                seed=seed,
                order=order,
                epoch=self._epoch,
                begun_again=self._begun_again,
                batches=self._batches,
                fetched=self._fetched,
                indices=fetcher.checks.get(self._fetched, UNKNOWN),
                **figures_of(loader),
            )
            for row, seed, order, fetcher, loader in zip(
                rows.own, self._seeds, self._orders, self._fetchers, self._loaders, strict=True
            )
        ]

    def _current(self) -> _Pass | None:
        return None if self._iterator is None else self._iterator()

    def _end_if_complete(self) -> None:
        if self._asked_at == self._loads and self._is_complete():
            self._move(self._epoch + 1)

    def _derived(self, seed: int) -> int:
        return derive_seed(seed, "loader", self._rng._rewinds.loaders, bits=63)

    def _is_complete(self) -> bool:
        """Whether all batches of this pass were fetched, if the loader tells how many."""
        try:
            length = min(map(len, self._loaders))
        except TypeError:
            return self._batches == self._limit
        return self._batches == self._limit or 0 < length <= self._fetched

    def _move(self, epoch: int, batches: int = 0, fetched: int = 0, begun_again: int = 0) -> None:
        self._epoch, self._batches, self._fetched = epoch, batches, fetched
        self._begun_again = begun_again
        # A save while this loader is going to rewind has to store what was loaded.
        waiting = self._rng._rewinds.waiting
        (waiting.add if self._is_loaded and fetched else waiting.discard)(self)
        for fetcher in self._fetchers:
            fetcher.end()
            fetcher.set_epoch(epoch)

    def _begin(self, again: bool) -> None:
        """Begin the pass that an iterator is about to go through, or go on in the middle of it.

        Args:
            again: Whether this iterator has begun it before, and was interrupted.
        """
        goes_on = self._is_loaded and self._fetched > 0
        if self._fetched and not goes_on and not again:
            self._say_left(f"epoch {self._epoch} begins anew, in another order")
            self._begun_again += 1
            self._batches = self._fetched = 0
        if goes_on and self._rng._rewinds.states is None:
            warn(
                "the loader goes on in the middle of an epoch, and nothing was loaded into its "
                "StatefulRNG: the model's streams are not those of the run that was saved. Load "
                "both from one checkpoint."
            )
        if threading.current_thread() is not self._thread:
            self._thread = threading.current_thread()
            warn(
                f"batches are fetched in another thread, {self._thread.name}: what the model draws "
                "during a fetch is undone, and drawn again. Fetch them in the thread that trains, "
                "and let workers make them in advance (num_workers=)."
            )
        for fetcher, position in zip(self._fetchers, self._positions(), strict=True):
            fetcher.begin(position)
        if goes_on:
            self._rng._rewinds.rewind_for_loaders()
        self._is_loaded, self._asked_at = False, self._loads
        self._rng._rewinds.waiting.discard(self)

    def _next(self) -> Any:
        if self._limit is not None and self._batches >= self._limit:
            raise StopIteration
        number, batches, error = self._fetched + 1, [], None
        for fetcher in self._fetchers:
            try:
                batches.append(fetcher.fetch(number))
            except StopIteration:
                raise
            except Exception as raised:
                error = error or raised
        self._fetched = number  # also if it failed: the loader's next batch is another one
        if error is not None:
            raise error
        self._batches += 1
        if self._by_rank:
            return dict(zip(self.loader, batches, strict=True))
        return batches[0]

    def _say_left(self, then: str) -> None:
        if not self._said_left:
            self._said_left = True
            warn(
                f"the loader's pass of epoch {self._epoch} was left behind batch {self._batches}, "
                f"and {then}. A checkpoint that was saved in between goes on in the middle of that "
                "pass. To end a pass early, give ResumableLoader batches_per_epoch=, or call "
                "set_epoch() before the save."
            )


class _Pass:
    """One pass over the loader; goes on after an exception, and where a load moves the loader."""

    def __init__(self, loader: ResumableLoader) -> None:
        self._loader = loader
        self._loads: int | None = None
        self._is_lost = False
        self._is_over = False

    def __iter__(self) -> _Pass:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        loader = self._loader
        if self._is_over:
            raise StopIteration
        if loader._current() is not self:
            raise RuntimeError(
                "a newer iterator of this ResumableLoader exists, and it has one position: go "
                "through it with one loop at a time, or wrap a second loader"
            )
        if self._loads != loader._loads or self._is_lost:
            loader._begin(again=self._is_lost)
            self._loads, self._is_lost = loader._loads, False
        try:
            return loader._next()
        except StopIteration:
            self._is_over = True
            loader._move(loader._epoch + 1)
            raise
        except Exception:
            raise
        except BaseException:
            self._is_lost = True  # nobody knows how far the loader's iterator has got
            raise

    def leave(self) -> None:
        """End the pass, if it has begun."""
        self._is_over = self._loads is not None
