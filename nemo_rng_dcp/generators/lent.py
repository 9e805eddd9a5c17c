"""Generators that a loader is lent while it makes a batch, on streams of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rng_dcp.generators.generator_set import GeneratorSet, States
from nemo_rng_dcp.generators.registry import generators_of_process, registered_generators


class LentGenerators:
    """Python's, NumPy's and torch CPU's global generators, those of a job, and a loader's own.

    They are taken, started and put back as they are in place now, in whichever scope the process
    is. Nothing here communicates.

    Args:
        job: The generators of the job; those that it registered are lent, and no device's global
            one: what a loader draws there is the job's.
        own: Those that the loader has beside them, by other names.

    Attributes:
        names: Of them all.
        shared: The names of those that are alike on all ranks.
        of_rank: The names of those of which each row of the job has its own, whatever ``ranked=``.

    Raises:
        ValueError, TypeError: As for :func:`registered_generators`.
    """

    def __init__(self, job: GeneratorSet, own: Mapping[str, Any]) -> None:
        registered = job.registered
        of_loader = registered_generators(own, {}, None)
        self._adapters = {**generators_of_process(None), **registered, **of_loader}
        self.names = list(self._adapters)
        self.shared = {name for name in registered if job.slots[name].shared}
        self.of_rank = registered.keys() - self.shared

    def take(self) -> States:
        """Return every generator's state by name; moves no stream.

        Raises:
            ValueError: A generator is in a state that cannot be stored.
        """
        with GeneratorSet.lock:
            return {name: adapter.get() for name, adapter in self._adapters.items()}

    def pack(self, states: Mapping[str, Any]) -> dict[str, bytes]:
        """Return states that :meth:`take` gave as bytes."""
        return {name: self._adapters[name].pack(state) for name, state in states.items()}

    def start(self, seeds: Mapping[str, int]) -> None:
        """Start streams from seeds, ``0 <= seed < 2**64``, by name."""
        with GeneratorSet.lock:
            for name, seed in seeds.items():
                self._adapters[name].seed(seed)

    def put_back(self, states: Mapping[str, Any]) -> None:
        """Write states that :meth:`take` gave; an interrupt in between does not stop it."""
        with GeneratorSet.lock:
            interrupt: BaseException | None = None
            for name, state in states.items():
                try:
                    self._adapters[name].set(state)
                except BaseException as error:
                    self._adapters[name].set(state)
                    interrupt = interrupt or error
            if interrupt is not None:
                raise interrupt
