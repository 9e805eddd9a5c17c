"""All generators of a process at once: read together, restored all or nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import GeneratorAdapter

_Result = TypeVar("_Result")

Generators = Mapping[str, GeneratorAdapter]
States = dict[str, Any]
"""By name, each in the generator's own form."""

_LOCK = threading.RLock()
"""Held while all generators are read or written, so that threads get whole snapshots."""
if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread holds it would wait for ever: that thread is not
    # in the child. So a fork waits for the lock instead.
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )


def take(generators: Generators) -> States:
    """Return every generator's state by name; moves no stream.

    Raises:
        RNGStateError: A generator is in a state that cannot be stored.
    """
    with _LOCK:
        return _by_name(generators, lambda name: generators[name].get())


def pack(generators: Generators, states: Mapping[str, Any]) -> dict[str, bytes]:
    """Return states that :func:`take` gave as bytes.

    Raises:
        RNGStateError: A state cannot be stored.
    """
    return _by_name(generators, lambda name: generators[name].pack(states[name]))


def unpack(generators: Generators, packed: Mapping[str, bytes]) -> States:
    """Return what :func:`pack` was given, of the generators that ``packed`` names.

    Raises:
        RNGStateError: A generator would not take its state.
    """
    return _by_name(packed, lambda name: generators[name].unpack(packed[name]))


def restore(
    generators: Generators, states: Mapping[str, Any], seeds: Mapping[str, int] | None = None
) -> States:
    """Put generators into states or start them from seeds, all or nothing.

    Args:
        generators: The adapters by name.
        states: By name, the states of those that are put into one; all of them were unpacked or
            taken before, and so are known to be good.
        seeds: By name, ``0 <= seed < 2**64``, those that start a new stream.

    Returns:
        The states of all generators afterwards, those included that were left alone.

    Raises:
        RNGStateError: A generator raised. Its exception is the cause, and all are put back.
    """
    seeds = seeds or {}
    with _LOCK:
        before = take(generators)
        try:
            for name, state in states.items():
                with _accepts(name):
                    generators[name].set(state)
            for name, seed in seeds.items():
                with _accepts(name):
                    generators[name].seed(seed)
            return {**before, **states, **take({name: generators[name] for name in seeds})}
        except BaseException:
            put_back(generators, before)
            raise


def put_back(generators: Generators, states: Mapping[str, Any]) -> None:
    """Write states that :func:`take` gave earlier; one that fails does not stop the others.

    Raises:
        RNGStateError: A generator did not take back its own state: it was exchanged meanwhile.
    """
    failed: tuple[str, BaseException] | None = None
    with _LOCK:
        for name, generator in generators.items():
            try:
                generator.set(states[name])
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
    """Return what ``function`` makes of each name, which an error of its then begins with."""
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
