"""Where the last load left the streams of a process, and the rewinds to there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from nemo_rng_dcp.errors import warn
from nemo_rng_dcp.first_forward import FirstForward
from nemo_rng_dcp.generators import GeneratorSet, States
from nemo_rng_dcp.ranks import global_rank

Packed = dict[int, dict[str, bytes]]
"""Packed states by rank and generator."""


class Rewinds:
    """What a load restored, and what is to go back to it.

    A rewind by hand and one at the first training forward stand for one another. That of a loader
    which goes on in the middle of a pass comes whatever was before: right before its first batch.

    Args:
        generators: The generators of the job.
        restore: Puts the streams of ranks into states.

    Attributes:
        states: Where the last load left the streams, by rank; ``None``: there was none, or it
            restored nothing.
        first_forward: The modules whose first training forward rewinds.
        loaders: How many loaders the job has made.
        waiting: Loaders whose next batch is in the middle of a pass.
    """

    def __init__(
        self, generators: GeneratorSet, restore: Callable[[Mapping[int, States]], None]
    ) -> None:
        self._generators, self._restore = generators, restore
        self.states: Mapping[int, States] | None = None
        self._is_done = self._is_done_for_loaders = True
        self.first_forward = FirstForward(
            lambda: self.is_due and generators.parked_at is None, self.rewind
        )
        self.loaders = 0
        self.waiting: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def is_due(self) -> bool:
        """Whether a load restored streams that nobody has rewound to since."""
        return self.states is not None and not self._is_done

    @property
    def is_due_for_loaders(self) -> bool:
        """The same for the rewind of loaders."""
        return self.states is not None and not self._is_done_for_loaders

    def note_load(self) -> None:
        """Note that streams were just loaded."""
        self._is_done = self._is_done_for_loaders = False

    def rewind(self) -> None:
        """Put every stream back to where the last load left it."""
        assert self.states is not None
        self._restore(self.states)
        self._is_done = True

    def rewind_for_loaders(self) -> None:
        """Rewind, unless a loader had it done since the last load."""
        if self.is_due_for_loaders:
            self.rewind()
        self._is_done_for_loaders = True

    def to_save(self, packed: Packed, is_for_a_load: bool) -> Packed:
        """Return what a save stores: the streams as they are, or what a loader will rewind to.

        Warns if something has drawn that a rewind to come, or one that was missed, concerns.

        Args:
            packed: The streams as they are.
            is_for_a_load: Whether nobody saves, but a load asks.
        """
        will_rewind = self.is_due_for_loaders and len(self.waiting) > 0
        is_awaited = self.is_due and bool(self.first_forward.names)
        if self.states is None or not (will_rewind or is_awaited):
            return packed
        loaded = {rank: self._generators.pack(states) for rank, states in self.states.items()}
        if packed != loaded and not is_for_a_load:
            if will_rewind:
                warn(
                    f"rank {global_rank()}: this save comes before the first batch of a "
                    "ResumableLoader that goes on in the middle of a pass, and something has drawn "
                    "since the load. What was loaded is stored, since that batch begins with a "
                    "rewind. If the loader is not used again, call its set_epoch()"
                )
            elif is_awaited:
                self._warn_that_it_was_missed()
        return loaded if will_rewind else packed

    def _warn_that_it_was_missed(self) -> None:
        warn(
            f"rank {global_rank()}: this save comes before the rewind that "
            f"rewind_at_first_forward() was asked for: since the load, no forward of "
            f"{' or '.join(self.first_forward.names)} has run in training mode, with gradients "
            "enabled and outside of a ScopedRNG (or when= has counted none). Whatever drew since "
            "the load has moved the streams, the resume is not exact, and no rewind follows now. "
            "Give it the module whose forward the step calls, or call rewind() right before the "
            "first step"
        )
        self.first_forward.release()
