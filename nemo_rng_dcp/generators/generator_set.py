"""All generators of a job at once: read together, restored all or nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators.registry import generators_of_process, registered_generators

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

    Threads may use it at the same time: what is taken and what is restored is whole. Draws of other
    threads are not synchronised.

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
        registered: Those that were given, by name.

    Raises:
        ValueError, TypeError: As for :func:`registered_generators`.
    """

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
        self.registered: dict[str, Any] = {**generators, **shared}
        of_process = generators_of_process(device) if global_generators else {}
        self.device, self.has_global = device, global_generators
        self._adapters = {**of_process, **registered}
        self.slots = {
            name: Slot(adapter.kind, name in shared, name in of_process)
            for name, adapter in self._adapters.items()
        }

    def take(self) -> States:
        """Return every generator's state by name; moves no stream.

        Raises:
            RNGStateError: A generator is in a state that cannot be stored.
        """
        with _LOCK:
            return _by_name(self._adapters, lambda name: self._adapters[name].get())

    def pack(self, states: Mapping[str, Any]) -> dict[str, bytes]:
        """Return states that :meth:`take` gave as bytes.

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

    def restore(self, states: Mapping[str, Any], seeds: Mapping[str, int] | None = None) -> States:
        """Put generators into states or start them from seeds, all or nothing.

        Args:
            states: By name, of those that are put into one; all of them were unpacked or taken
                before, and so are known to be good.
            seeds: By name, ``0 <= seed < 2**64``, of those that start a new stream instead.

        Returns:
            The states of all generators afterwards, those included that were left alone.

        Raises:
            RNGStateError: A generator raised. Its exception is the cause, and all are put back.
        """
        seeds = seeds or {}
        with _LOCK:
            before = self.take()
            try:
                for name in self._adapters:
                    with _accepts(name):
                        if name in seeds:
                            self._adapters[name].seed(seeds[name])
                        elif name in states:
                            self._adapters[name].set(states[name])
                return {**before, **states, **{name: self._adapters[name].get() for name in seeds}}
            except BaseException:
                self.put_back(before)
                raise

    def start(self, seeds: Mapping[str, int]) -> None:
        """Start streams from seeds; whoever calls it has the states from before.

        Args:
            seeds: By name, ``0 <= seed < 2**64``.
        """
        with _LOCK:
            for name, seed in seeds.items():
                self._adapters[name].seed(seed)

    def put_back(self, states: Mapping[str, Any]) -> None:
        """Write states that :meth:`take` gave earlier; one that fails does not stop the others.

        Raises:
            RNGStateError: A generator did not take back its own state: it was exchanged meanwhile.
        """
        failed: tuple[str, BaseException] | None = None
        with _LOCK:
            for name, adapter in self._adapters.items():
                try:
                    adapter.set(states[name])
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


def _by_name(names: Iterable[str], function: Callable[[str], _Result]) -> dict[str, _Result]:
    """Return what ``function`` makes of each name; an error begins with the name."""
    results = {}
    for name in names:
        try:
            results[name] = function(name)
        except ValueError as error:
            raise RNGStateError(f"{name}: {error}") from error
    return results


@contextmanager
def _accepts(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RNGStateError(
            f"{name}: the generator did not take its state ({type(error).__name__}: {error}); "
            "every stream is back where it was before"
        ) from error
