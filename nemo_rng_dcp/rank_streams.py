"""The streams of all ranks that a process plays, of which the generators have one at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.generators import GeneratorSet, States
from nemo_rng_dcp.ranks import global_rank, note_playing

Seeds = Mapping[str, int]
"""By generator, the seed of a stream that starts anew."""


class _Moment(NamedTuple):
    """Where all streams are; exchanged as a whole, so that a signal handler sees one moment.

    Attributes:
        rank: The current rank.
        parked: The states of the ranks; the current one's, if it has an entry, is out of date.
        here: The current rank's while the generators are written; ``None``: ask the generators.
        outside: The current rank's when the last as_rank() ended; ``None``: it is not looked at.
    """

    rank: int
    parked: Mapping[int, States]
    here: States | None
    outside: States | None


class _Entry(NamedTuple):
    """An as_rank() that has not ended, and who entered it: a thread, and a task in it if any."""

    rank: int
    thread: int
    task: object


class RankStreams:
    """Switches the generators of a process between the streams of the ranks that it plays.

    A generator has one stream at a time: that of the current rank. The streams of the other ranks
    are kept in memory. Outside of :meth:`as_rank` the current rank is the first one. A generator
    that all ranks share has a copy for each of them; a draw outside of :meth:`as_rank` counts for
    all of them.

    Nothing here communicates. Threads may use it at the same time, and see whole states; which rank
    is current is one thing for all of them, so two of them cannot enter two ranks at a time.

    Args:
        generators: The generators.
        ranks: The ranks that this process plays: one, or more if they are logical. All start from
            the streams that the generators have.
        logical: Whether another number of processes must give the same streams, so that draws
            outside of :meth:`as_rank` are looked for.

    Attributes:
        ranks: As given.
        lent: By generator, the current rank's state where a loader has its own in place.
    """

    def __init__(self, generators: GeneratorSet, ranks: range, *, logical: bool) -> None:
        self.ranks = ranks
        self.lent: States = {}
        self._drawn_outside: set[str] = set()
        self._generators = generators
        self._logical = logical
        parked = dict.fromkeys(ranks, generators.take()) if logical else {}
        self._moment = _Moment(ranks[0], parked, None, None)
        self._entered: dict[object, _Entry] = {}
        self._steady = _Steady(self)

    @property
    def rank(self) -> int:
        """The current rank."""
        return self._moment.rank

    @property
    def is_inside(self) -> bool:
        """Whether :meth:`as_rank` was entered and has not ended."""
        return bool(self._entered)

    def renumber(self, rank: int) -> None:
        """Call the only rank something else: the process group came after the streams."""
        self.ranks = range(rank, rank + 1)
        self._moment = self._moment._replace(rank=rank)
        self._entered = {key: entry._replace(rank=rank) for key, entry in self._entered.items()}

    def take(self, *, is_for_a_load: bool = False) -> dict[int, States]:
        """Return the states of all generators by rank, in their order; moves no stream.

        Args:
            is_for_a_load: Whether they are about to be replaced, and so may be what no save stores.

        Raises:
            RNGStateError: A generator cannot be stored; or one that all ranks share was drawn from
                outside of :meth:`as_rank` while they had different streams of it.
        """
        with self._steady:
            here = self._look(is_for_a_load)
            now = {**self._moment.parked, self._moment.rank: here}
            return {rank: now[rank] for rank in self.ranks}

    def restore(
        self, states: Mapping[int, States], seeds: Mapping[int, Seeds] | None = None
    ) -> dict[int, States]:
        """Put the streams of ranks into states or start them from seeds, all or nothing.

        Args:
            states: By rank and generator, unpacked or taken before. What is not named stays.
            seeds: By rank and generator, of those that start a new stream instead.

        Returns:
            The states of all generators afterwards, by rank.

        Raises:
            RNGStateError: A generator raised. Its exception is the cause, and the streams of all
                ranks are back where they were.
        """
        seeds, generators = seeds or {}, self._generators
        with self._steady:
            now = before = generators.take()
            moment = self._moment
            after = {**moment.parked, moment.rank: before}
            try:
                self._moment = moment._replace(here=before)
                # The current rank comes last: its streams stay in the generators.
                for rank in (*(r for r in self.ranks if r != moment.rank), moment.rank):
                    new = {**after[rank], **states.get(rank, {})}
                    now = generators.restore(new, seeds.get(rank), before=now)
                    after[rank] = now
                self._drawn_outside.clear()
                self._moment = _Moment(moment.rank, after, None, None)
            except BaseException:
                generators.restore(before)
                self._moment = moment
                raise
            return {rank: after[rank] for rank in self.ranks}

    def warn_of_draws_outside(self) -> None:
        """Warn, once for each, of draws that another number of processes would not make.

        Counted are those from outside of :meth:`as_rank` since the last restore, as of the last
        :meth:`take`; draws from what all ranks share are the same on any number.
        """
        names, self._drawn_outside = sorted(self._drawn_outside), set()
        if names:
            warn(
                f"rank {global_rank()}: {', '.join(names)} drawn from outside of as_rank() since "
                "the last load or such warning. Those numbers were logical rank "
                f"{self.ranks[0]}'s, and would be another's on another number of processes: "
                "draw inside of as_rank(), or resume on as many processes"
            )

    @contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        """Give the generators a rank's streams for a while; afterwards those of the one before.

        Of those that were entered and have not ended, the last one is current, in whichever order
        they end.

        Args:
            rank: One of ``ranks``.

        Raises:
            ValueError: This process does not play that rank.
            RuntimeError: A ``ScopedRNG`` has other streams in place: all ranks would draw from it.
                Or another thread or task is inside of another rank: it would draw from this one.
            RNGStateError: A generator does not take its state, or as for :meth:`take`. All streams
                are back where they were.
        """
        # isinstance(rank, SupportsIndex) takes 10 us, and every micro-batch enters here.
        if not hasattr(rank, "__index__") or rank not in self.ranks:
            first, last = self.ranks[0], self.ranks[-1]
            plays = f"rank {first}" if first == last else f"ranks {first} to {last}"
            raise ValueError(
                f"as_rank({rank!r}): this process plays {plays}, no other. Loop over rng.ranks"
            )
        scope = self._generators.parked_at if self._logical else None
        if scope is not None and not (self._entered and rank == self.rank):
            raise RuntimeError(
                f"as_rank({rank}) inside the ScopedRNG entered at {scope}: its streams would stay "
                "in place, and the ranks of a process would draw from them one after the other. "
                "Open the scope inside of as_rank()"
            )
        entry, own = object(), _Entry(int(rank), threading.get_ident(), _current_task())
        try:
            with self._steady:
                self._refuse_others(own)
                outside = self._moment.outside
                here = None if outside is None else self._look()
                self._entered[entry] = own
                try:
                    self._settle(here)
                except BaseException:
                    del self._entered[entry]
                    raise
            yield
        finally:
            # A generator that is collected may end in the middle of a switch: that one goes on.
            with self._steady:
                self._entered.pop(entry, None)

    def _refuse_others(self, own: _Entry) -> None:
        for entry in self._entered.values():
            if entry.rank != own.rank and entry[1:] != own[1:]:
                raise RuntimeError(
                    f"as_rank({own.rank}) while another thread or task is inside of "
                    f"as_rank({entry.rank}): a process has the streams of one rank at a time, and "
                    "that one would draw from these. Play one rank after the other"
                )

    def _settle(self, here: States | None = None) -> None:
        """Switch to the rank that should be current; ``here`` are the generators' states."""
        generators = self._generators
        while True:
            moment, inside = self._moment, bool(self._entered)
            last = next(reversed(self._entered.values()), None)
            rank = self.ranks[0] if last is None else last.rank
            if rank == moment.rank:
                break
            here = here or generators.take()
            new = moment.parked[rank]
            try:
                self._moment = moment._replace(here=here)
                generators.restore(new, before=here)
                self._moment = _Moment(rank, {**moment.parked, moment.rank: here}, None, None)
            except BaseException:
                generators.restore(here)
                self._moment = moment
                raise
            here = new
        if self._logical and generators.has_global:
            note_playing(rank if inside else None)
        if inside and moment.outside is not None:
            self._moment = _Moment(rank, moment.parked, None, None)
        elif self._logical and not inside and moment.outside is None:
            self._moment = _Moment(rank, moment.parked, None, here or generators.take())

    def _look(self, is_for_a_load: bool = False) -> States:
        """Return the current rank's states, after a look at what moved outside of as_rank().

        Args:
            is_for_a_load: As for :meth:`take`.
        """
        moment, generators = self._moment, self._generators
        if moment.here is not None:
            return moment.here  # a signal handler asks in the middle of a switch
        now = generators.take()
        if self.lent:
            # What a scope has parked is not what was lent.
            in_scope = generators.parked_at is not None
            for name, slot in generators.slots.items():
                if name in self.lent and not (in_scope and slot.is_global):
                    now[name] = self.lent[name]
        if moment.outside is None or is_for_a_load:
            return now
        moved = generators.moved(moment.outside, now)
        shared = {name for name in moved if generators.slots[name].shared}
        others = [rank for rank in self.ranks if rank != moment.rank]
        for rank in others:
            apart = shared and shared.intersection(
                generators.moved(moment.outside, moment.parked[rank])
            )
            if apart:
                raise RNGStateError(
                    f"{', '.join(sorted(apart))}: all ranks share it, and a draw outside of "
                    f"as_rank() counts for all. There was one while rank {rank} had drawn inside "
                    f"another number of times than rank {moment.rank}, so it would depend on the "
                    "number of processes what they get. Draw outside only, or equally often "
                    "inside of each rank before"
                )
        for_all = {name: now[name] for name in shared}
        parked = {rank: {**moment.parked[rank], **for_all} for rank in others}
        self._drawn_outside.update(set(moved) - shared)
        self._moment = _Moment(moment.rank, parked, None, now)
        return now


def _current_task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


class _Steady:
    """Holds the lock, and afterwards makes current what was entered last and has not ended."""

    def __init__(self, streams: RankStreams) -> None:
        self._streams, self._depth = streams, 0

    def __enter__(self) -> None:
        self._streams._generators.lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        try:
            if self._depth == 1:
                self._streams._settle()
        finally:
            self._depth -= 1
            self._streams._generators.lock.release()
