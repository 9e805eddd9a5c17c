"""All generators of a job at once: read together, restored all or nothing."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.generators.adapter import GeneratorAdapter
from nemo_rng_dcp.generators.held import Held
from nemo_rng_dcp.generators.parked import (
    Parked,
    first_inside,
    next_inside,
    open_scopes,
    park,
    unpark,
)
from nemo_rng_dcp.generators.python_random import PythonAdapter
from nemo_rng_dcp.generators.registry import (
    generators_of_process,
    registered_generators,
    source_of,
)

_Result = TypeVar("_Result")

States = dict[str, Any]
"""By name, each in the generator's own form."""

_LOCK = threading.RLock()
"""Held while all generators are read or written, so that threads get whole states."""
if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread holds it would wait for ever: that thread is not
    # in the child. So a fork waits for the lock instead.
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )


class Slot(NamedTuple):
    """A generator's place in a job.

    Attributes:
        kind: What is stored, see ``GeneratorAdapter.kind``.
        shared: Whether it is alike on all ranks; otherwise each row has its own.
        is_global: Whether it is one of the process's global generators.
    """

    kind: str
    shared: bool
    is_global: bool


class GeneratorSet:
    """Generators by name, in the order in which a record has them. Nothing here communicates.

    Threads and signal handlers may use it at any time: what is taken and what is restored is whole.
    Draws of other threads are not synchronised.

    The global streams in it are those of the scope in which it was made (``ScopedRNG``). While
    another scope inside that one has its own in place, they are parked: they are taken and
    restored where they wait.

    Args:
        device: The accelerator device whose global generator is this rank's; ``None``: no device's.
        generators: Those that a job keeps beside the global ones, by name; see
            :func:`registered_generators`.
        shared: More of them, which are alike on all ranks.
        global_generators: Whether the process's global generators are in the set.

    Attributes:
        slots: By name.
        device: As given.
        has_global: Whether the process's global generators are in the set.
        lock: Held while generators are read or written. One for all sets, and reentrant: whoever
            does several things at once holds it around them.

    Raises:
        ValueError, TypeError: As for :func:`registered_generators`.
    """

    lock = _LOCK

    def __init__(
        self,
        device: torch.device | None,
        generators: Mapping[str, Any] | None = None,
        shared: Mapping[str, Any] | None = None,
        *,
        global_generators: bool = True,
    ) -> None:
        generators = {} if generators is None else generators
        shared = {} if shared is None else shared
        registered = registered_generators(generators, shared, device)
        of_process = generators_of_process(device) if global_generators else {}
        self.device, self.has_global = device, global_generators
        self._adapters = {**of_process, **registered}
        self._scopes = open_scopes()
        self._held = Held(generators, shared)
        self.slots = {
            name: Slot(adapter.kind, name.partition(".")[0] in shared, name in of_process)
            for name, adapter in self._adapters.items()
        }

    @property
    def registered(self) -> dict[str, GeneratorAdapter]:
        """The adapters of those that the job registered, by name."""
        return {n: adapter for n, adapter in self._adapters.items() if not self.slots[n].is_global}

    @property
    def names_by_source(self) -> dict[int, str]:
        """The names of the registered objects by :func:`source_of`; of functions there is none."""
        return {source_of(generator): name for name, generator in self._held.generators.items()}

    @property
    def parked_at(self) -> str | None:
        """Where the scope was entered that has other global streams in place, ``file:line``."""
        parked = self._parked()
        return None if parked is None else parked.place

    def warn_in_a_scope(self, what: str) -> None:
        """Warn if another scope has its streams in place; ``what`` are those that wait for it."""
        place = self.parked_at
        if place is not None:
            warn(
                f"inside the ScopedRNG entered at {place}: {what} the streams that come back when "
                "it ends, not the scope's own"
            )

    def warn_of_exchanged(self) -> None:
        """Warn of registered generators that nobody else holds any more, see :class:`Held`."""
        self._held.warn_of_dropped()

    def in_this_scope(self) -> GeneratorSet:
        """Return a set of the same generators whose global streams are those in place now."""
        other = copy.copy(self)
        other._scopes = open_scopes()
        return other

    def take(self) -> States:
        """Return every generator's state by name; moves no stream.

        Raises:
            RNGStateError: A generator is in a state that cannot be stored.
        """
        with _LOCK:
            return self._take(self._waiting())

    def pack(self, states: Mapping[str, Any]) -> dict[str, bytes]:
        """Return states that :meth:`take` or :meth:`unpack` gave as bytes.

        Raises:
            RNGStateError: A state cannot be stored.
        """
        return _by_name(states, lambda name: self._adapters[name].pack(states[name]))

    def unpack(self, packed: Mapping[str, bytes]) -> States:
        """Return what :meth:`pack` was given, of the generators that ``packed`` names.

        Raises:
            RNGStateError: A generator would not take its state.
        """
        return _by_name(packed, lambda name: self._adapters[name].unpack(packed[name]))

    def moved(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
        """Return the names of those whose states differ; both were taken or unpacked."""
        return [name for name in before if not self._same(name, before[name], after[name])]

    def restore(
        self,
        states: Mapping[str, Any],
        seeds: Mapping[str, int] | None = None,
        *,
        before: States | None = None,
    ) -> States:
        """Put generators into states or start them from seeds, all or nothing.

        Args:
            states: By name, of those that are put into one; all of them were unpacked or taken
                before, and so are known to be good.
            seeds: By name, ``0 <= seed < 2**64``, of those that start a new stream instead.
            before: What :meth:`take` gave under the lock, which is held since; ``None``: take it.

        Returns:
            The states of all generators afterwards, those included that were left alone.

        Raises:
            RNGStateError: A generator raised. Its exception is the cause, and all are put back.
        """
        seeds = seeds or {}
        with _undisturbed():
            parked, waiting = self._parked(), self._waiting()
            live = self._take({}) if before is None or waiting else before
            before = {**live, **waiting}

            def write() -> States:
                self._put(waiting)
                for name, adapter in self._adapters.items():
                    try:
                        if name in seeds:
                            adapter.seed(seeds[name])
                        elif name in states:
                            adapter.set(states[name])
                    except Exception as error:
                        raise RNGStateError(
                            f"{name}: the generator did not take its state "
                            f"({type(error).__name__}: {error}); every stream is back where it was "
                            "before"
                        ) from error
                new = {name: self._adapters[name].get() for name in seeds}
                after = {**before, **states, **new}
                if parked is not None:
                    parked.states = {**parked.states, **{name: after[name] for name in waiting}}
                    self._put({name: live[name] for name in waiting})
                return after

            return _Write(self, live, parked).run(write)

    def enter(self, place: str, seed: int | None) -> Parked:
        """Park the global streams and start others, until :meth:`leave`.

        Args:
            place: Where the scope is entered, ``file:line``.
            seed: What they start from; ``None``: they go on.

        Raises:
            RNGStateError: As for :meth:`take` and :meth:`restore`; the scope is not entered.
        """
        with _undisturbed():
            parked = Parked(self.device, self._take(self._waiting()), place)
            park(parked)
            self._scopes = open_scopes()
            try:
                if seed is not None:
                    self.restore({}, dict.fromkeys(self.slots, seed))
            except BaseException:
                unpark(parked)
                raise
            return parked

    def leave(self, parked: Parked) -> Parked | None:
        """End a scope and put back the streams that it parked.

        Returns:
            A scope that was entered inside it and is still open, which puts them back instead;
            ``None``: they are back.

        Raises:
            RNGStateError: A generator did not take back its own state: it was exchanged meanwhile.
        """
        with _undisturbed():
            inner = next_inside(parked)
            try:
                if inner is None:
                    _Write(self, {}, None).run(lambda: self._put(parked.states))
                else:
                    for_inner = inner.names_on(parked.device) & set(parked.states)
                    inner.states.update({name: parked.states[name] for name in for_inner})
                    self._put({n: s for n, s in parked.states.items() if n not in for_inner})
            finally:
                unpark(parked)
            return inner

    def _same(self, name: str, before: Any, after: Any) -> bool:
        adapter = self._adapters[name]
        if isinstance(adapter, PythonAdapter):
            return before is after or adapter.glance(before) == adapter.glance(after)
        return adapter.pack(before) == adapter.pack(after)

    def _parked(self) -> Parked | None:
        return first_inside(self._scopes) if self.has_global else None

    def _waiting(self) -> States:
        """Return the states of this set's generators that are parked."""
        parked = self._parked()
        if parked is None:
            return {}
        states = parked.states
        if _under_way is not None and _under_way.parked is parked:
            states = _under_way.parked_before
        names = parked.names_on(self.device)
        return {
            name: states[name]
            for name, slot in self.slots.items()
            if slot.is_global and name in names
        }

    def _take(self, waiting: States) -> States:
        interrupted = {} if _under_way is None else _under_way.live

        def state(name: str) -> Any:
            if name in waiting:
                return waiting[name]
            if interrupted and (key := self._key(name)) in interrupted:
                return interrupted[key]
            return self._adapters[name].get()

        return _by_name(self._adapters, state)

    def _key(self, name: str) -> object:
        """Return what tells a generator from those of other sets in this process."""
        if not self.slots[name].is_global:
            return self._adapters[name]
        is_device = self.device is not None and name == self.device.type
        return self.device if is_device else name

    def _put(self, states: Mapping[str, Any]) -> None:
        """Write states that were taken earlier; one that fails does not stop the others.

        Raises:
            RNGStateError: A generator did not take back its own state: it was exchanged meanwhile.
        """
        failed: tuple[str, BaseException] | None = None
        for name in states:
            try:
                self._adapters[name].set(states[name])
            except BaseException as error:
                failed = failed or (name, error)
        if failed is None:
            return
        name, reason = failed
        if not isinstance(reason, Exception):
            raise reason  # an interrupt, not this generator's refusal
        exchanged = "Was it exchanged meanwhile by np.random.set_bit_generator()?"
        hint = exchanged if name == "numpy" else "Its stream may have moved."
        raise RNGStateError(
            f"{name}: the generator does not take back its own earlier state "
            f"({type(reason).__name__}: {reason}). {hint}"
        ) from reason


class _Write:
    """A write under the lock that a signal handler of the same thread may come into.

    A handler that reads gets the states from before. One that writes undoes it first, and it starts
    again afterwards.
    """

    def __init__(self, generators: GeneratorSet, live: States, parked: Parked | None) -> None:
        self._generators, self._states = generators, live
        self.live = {generators._key(name): state for name, state in live.items()}
        self.parked = parked
        self.parked_before = {} if parked is None else parked.states

    def run(self, write: Callable[[], _Result]) -> _Result:
        global _under_way
        while True:
            self._undone, _under_way = False, self
            try:
                result = write()
            except BaseException:
                self.undo()
                raise
            finally:
                _under_way = None
            if not self._undone:
                return result

    def undo(self) -> None:
        if self.parked is not None:
            self.parked.states = self.parked_before
        self._generators._put(self._states)
        self._undone = True


_under_way: _Write | None = None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold the lock, with no write half done."""
    global _under_way
    with _LOCK:
        if _under_way is not None:
            _under_way.undo()
            _under_way = None
        yield


def _by_name(names: Iterable[str], function: Callable[[str], _Result]) -> dict[str, _Result]:
    """Return what ``function`` makes of each name; an error begins with the name."""
    results = {}
    for name in names:
        try:
            results[name] = function(name)
        except ValueError as error:
            raise RNGStateError(f"{name}: {error}") from error
    return results
