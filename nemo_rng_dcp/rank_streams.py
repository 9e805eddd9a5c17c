"""The streams of all ranks that a process plays, of which the generators have one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import GeneratorSet, States
from nemo_rng_dcp.seeding import is_integer

Seeds = Mapping[str, int]
"""By generator, the seed of a stream that starts anew."""


class RankStreams:
    """Switches the generators of a process between the streams of the ranks that it plays.

    A generator has one stream at a time: that of the current rank. The streams of the other ranks
    are kept in memory. Outside of :meth:`as_rank` the current rank is the first one. A generator
    that all ranks share has a copy for each of them; a draw outside of :meth:`as_rank` counts for
    all of them.

    Nothing here communicates. Threads may use it at the same time, and see whole states; which rank
    is current is one thing for all of them.

    Args:
        generators: The generators.
        ranks: The ranks that this process plays: one, or more if they are logical. All start from
            the streams that the generators have.
        logical: Whether another number of processes must give the same streams, so that draws
            outside of :meth:`as_rank` are looked for.

    Attributes:
        ranks: As given.
        rank: The current one.
        drawn_outside: Generators that were drawn from outside of :meth:`as_rank` since the last
            restore, as of the last :meth:`take`; those that all ranks share not counted. Whoever
            has told of them may clear it.
    """

    def __init__(self, generators: GeneratorSet, ranks: range, *, logical: bool = False) -> None:
        self.ranks, self.rank = ranks, ranks[0]
        self.drawn_outside: set[str] = set()
        self._generators = generators
        here = generators.take() if logical else None
        # The current rank may have an entry as well, which is out of date.
        self._parked = {} if here is None else dict.fromkeys(ranks, here)
        self._entered: dict[object, int] = {}
        self._logical = logical
        # The current rank's states when the last as_rank() ended; None: not looked at.
        self._outside = here
        self._steady = False
        # The current rank's states while generators are written.
        self._before: States | None = None

    @property
    def is_inside(self) -> bool:
        """Whether :meth:`as_rank` was entered and has not ended."""
        return bool(self._entered)

    def renumber(self, rank: int) -> None:
        """Call the only rank something else: the process group came after the streams."""
        self.ranks, self.rank = range(rank, rank + 1), rank
        self._entered = dict.fromkeys(self._entered, rank)

    def take(self) -> dict[int, States]:
        """Return the states of all generators by rank; moves no stream.

        Raises:
            RNGStateError: A generator cannot be stored; or one that all ranks share was drawn from
                outside of :meth:`as_rank` while they had different streams of it.
        """
        with self._kept_steady():
            # A signal handler may ask in the middle of a switch.
            here = self._look() if self._before is None else self._before
            return {**self._parked, self.rank: here}

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
        seeds = seeds or {}
        with self._kept_steady():
            parked, outside, before = self._parked, self._outside, self._generators.take()
            after = {**parked, self.rank: before}
            self._before = before
            try:
                # The current rank comes last: its streams stay in the generators.
                for rank in (*(r for r in self.ranks if r != self.rank), self.rank):
                    new_states = {**after[rank], **states.get(rank, {})}
                    self._generators.write(new_states, seeds.get(rank, {}))
                    after[rank] = self._generators.take()
                self._parked = after
                self._outside = None if outside is None else after[self.rank]
            except BaseException:
                self._generators.put_back(before)
                self._parked, self._outside = parked, outside
                raise
            finally:
                self._before = None
            self.drawn_outside.clear()
            return dict(after)

    @contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        """Give the generators a rank's streams for a while; afterwards those of the one before.

        Of those that were entered and have not ended, the last one is current, in whichever order
        they end.

        Args:
            rank: One of ``ranks``.

        Raises:
            ValueError: This process does not play that rank.
            RNGStateError: A generator does not take its state, or as for :meth:`take`. All streams
                are back where they were.
        """
        if not is_integer(rank) or rank not in self.ranks:
            first, last = self.ranks[0], self.ranks[-1]
            plays = f"rank {first}" if first == last else f"ranks {first} to {last}"
            raise ValueError(
                f"as_rank({rank!r}): this process plays {plays}, no other. Loop over rng.ranks"
            )
        entry = object()
        try:
            with self._kept_steady():
                here = None if self._outside is None else self._look()
                self._entered[entry], self._outside = int(rank), None
                self._settle(here)
            yield
        finally:
            # A generator that is collected may end in the middle of a switch: that one goes on.
            with self._kept_steady():
                self._entered.pop(entry, None)

    @contextmanager
    def _kept_steady(self) -> Iterator[None]:
        """Hold the lock, and afterwards make current what was entered last and has not ended."""
        with self._generators.lock:
            outer, self._steady = self._steady, True
            try:
                yield
            finally:
                if not outer:
                    self._settle()
                self._steady = outer

    def _settle(self, here: States | None = None) -> None:
        """Switch to the rank that should be current; ``here`` are the states, if known."""
        while self.rank != (rank := next(reversed(self._entered.values()), self.ranks[0])):
            before = self.rank
            self._before = self._parked[before] = here or self._generators.take()
            here = self._parked[rank]
            try:
                self._generators.put_back(here)
                self.rank = rank
            except BaseException:
                self._generators.put_back(self._before)
                self.rank = before
                raise
            finally:
                self._before = None
        if self._logical and not self._entered and self._outside is None:
            self._outside = here or self._generators.take()

    def _look(self) -> States:
        """Return the current rank's states, after a look at what moved outside of as_rank()."""
        now = self._generators.take()
        if self._outside is None:
            return now
        moved = self._generators.moved(self._outside, now)
        shared = {name for name in moved if self._generators.slots[name].shared}
        others = [rank for rank in self.ranks if rank != self.rank]
        for rank in others if shared else ():
            apart = shared.intersection(self._generators.moved(self._outside, self._parked[rank]))
            if apart:
                raise RNGStateError(
                    f"{', '.join(sorted(apart))}: all ranks share it, and a draw outside of "
                    f"as_rank() counts for all. There was one while rank {rank} had drawn inside "
                    f"another number of times than rank {self.rank}, so it would depend on the "
                    "number of processes what they get. Draw outside only, or equally often "
                    "inside of each rank before"
                )
        for rank in others:
            self._parked[rank] = {**self._parked[rank], **{name: now[name] for name in shared}}
        self.drawn_outside.update(set(moved) - shared)
        self._outside = now
        return now
