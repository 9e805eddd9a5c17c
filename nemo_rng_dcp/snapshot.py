"""All generators of a process at once: read together, restored all or nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_rng_dcp.adapters import GeneratorAdapter, read_state
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import global_generators
from nemo_rng_dcp.mt19937 import MT19937State
from nemo_rng_dcp.torch_adapters import AcceleratorAdapter, bytes_to_int64, current_accelerator

_LOCK = threading.RLock()
"""Held while all generators are read or written, so that threads get whole snapshots."""
if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread holds it would wait for ever: that thread is not
    # in the child. So a fork waits for the lock instead.
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )


def read(generators: Mapping[str, GeneratorAdapter]) -> dict[str, torch.Tensor]:
    """Return every generator's state by name; moves no stream.

    Raises:
        RNGStateError: A generator is in a state that cannot be stored.
    """
    states = {}
    with _LOCK:
        for name, generator in generators.items():
            try:
                states[name] = read_state(generator)
            except ValueError as error:
                raise RNGStateError(f"{name}: {error}") from error
    return states


def restore(
    generators: Mapping[str, GeneratorAdapter],
    states: Mapping[str, torch.Tensor],
    seeds: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Put every generator into its state, all or nothing.

    Every state is checked before any generator is touched. If one cannot be written all the same,
    those already written are put back.

    Args:
        generators: The adapters by name.
        states: The states, with the same names.
        seeds: By name, the generators that are seeded instead of put into their state, and the
            seeds, ``0 <= seed < 2**64``.

    Returns:
        The states that the generators are in now.

    Raises:
        RNGStateError: A state is missing, not expected or malformed. No stream has moved.
    """
    check(generators, states)
    with put_back_on_error(generators):
        for name, generator in generators.items():
            if seeds and name in seeds:
                generator.seed(seeds[name])
            else:
                generator.write(states[name])
        return read(generators) if seeds else dict(states)


def check(generators: Mapping[str, GeneratorAdapter], states: Mapping[str, torch.Tensor]) -> None:
    """Raise ``RNGStateError`` unless ``states`` fit ``generators`` by name and by value."""
    for name, generator in generators.items():
        if name not in states:
            raise RNGStateError(
                f"{name}: the state holds nothing for this generator, only {sorted(states)}. Give "
                "StatefulRNG the generators that it had when the state was taken."
            )
        try:
            generator.check(states[name])
        except ValueError as error:
            raise RNGStateError(f"{name}: {error}") from error
    for name in states:
        if name not in generators:
            raise RNGStateError(
                f"{name}: this process has no such generator, only {sorted(generators)}. Give it "
                "to StatefulRNG, or leave it out of the state."
            )


@contextmanager
def put_back_on_error(
    generators: Mapping[str, GeneratorAdapter],
) -> Iterator[dict[str, torch.Tensor]]:
    """Put every generator back to where it is now, which is yielded, if the block raises.

    Other threads' snapshots wait for the block.
    """
    with _LOCK:
        before = read(generators)
        try:
            yield before
        except BaseException:
            put_back(generators, before)
            raise


def put_back(
    generators: Mapping[str, GeneratorAdapter], states: Mapping[str, torch.Tensor]
) -> None:
    """Write states that :func:`read` gave earlier; one that fails does not stop the others.

    Raises:
        RNGStateError: A generator did not take back its own state: it was exchanged meanwhile.
    """
    failed: tuple[str, BaseException] | None = None
    with _LOCK:
        for name, generator in generators.items():
            try:
                generator.write(states[name])
            except BaseException as error:
                failed = failed or (name, error)
    if failed is None:
        return
    name, reason = failed
    if not isinstance(reason, Exception):
        raise reason  # an interrupt, not this generator's refusal
    raise RNGStateError(
        f"{name}: the generator does not take back its own earlier state ({reason}). Was it "
        "exchanged meanwhile, for example by np.random.set_bit_generator()?"
    ) from reason


@dataclass
class RNGState:
    """The global streams of one process, in each library's own format (NeMo Automodel's names).

    Attributes:
        random_rng_state: As ``random.getstate()`` gives it.
        np_rng_state: As ``numpy.random.get_state()`` gives it.
        torch_rng_state: As ``torch.get_rng_state()`` gives it: uint8, shape ``(5056,)``.
        cuda_rng_state: The accelerator's states, uint8: the current device's alone, or one for
            each visible device as ``torch.cuda.get_rng_state_all()`` gives them; empty without
            an accelerator.
    """

    random_rng_state: tuple[Any, ...]
    np_rng_state: tuple[Any, ...]
    torch_rng_state: torch.Tensor
    cuda_rng_state: list[torch.Tensor]


def _get_rng_state() -> RNGState:
    """Return the global streams of this process; moves none and does not communicate.

    Returns:
        The state; its ``cuda_rng_state`` holds the current accelerator device's alone.

    Raises:
        RNGStateError: NumPy's global generator does not run MT19937.
    """
    generators = global_generators()
    states = read(generators)
    return RNGState(
        random_rng_state=MT19937State.from_tensor(states["python"]).to_python(),
        np_rng_state=MT19937State.from_tensor(states["numpy"]).to_numpy(),
        torch_rng_state=torch.get_rng_state(),
        cuda_rng_state=[
            generator.state_bytes()
            for generator in generators.values()
            if isinstance(generator, AcceleratorAdapter)
        ],
    )


def _restore_rng_state(state: RNGState) -> None:
    """Put the global streams of this process into a state; does not communicate.

    Args:
        state: What :func:`_get_rng_state` gave, or an ``RNGState`` of NeMo Automodel.

    Raises:
        RNGStateError: A field is missing or malformed, or the state and this process do not have
            the same accelerator streams. No stream has moved.
    """
    restore(global_generators(), states_of(state))


def states_of(state: RNGState) -> dict[str, torch.Tensor]:
    """Return the states in an ``RNGState`` as :func:`read` would give them; moves no stream.

    Returns:
        By name, int64, shape ``(n,)`` each: the global generators'.

    Raises:
        RNGStateError: A field is missing or malformed.
    """
    device = current_accelerator()
    fields: list[tuple[str, str, Callable[[Any], torch.Tensor]]] = [
        ("python", "random_rng_state", lambda field: MT19937State.from_python(field).to_tensor()),
        ("numpy", "np_rng_state", lambda field: MT19937State.from_numpy(field).to_tensor()),
        ("torch", "torch_rng_state", bytes_to_int64),
        ("cuda" if device is None else device.type, "cuda_rng_state", _own_device_state),
    ]
    states = {}
    for name, field, convert in fields:
        value = getattr(state, field, None)
        if value is None:
            raise RNGStateError(f"{name}: the RNGState has no {field}")
        if field == "cuda_rng_state" and device is None and isinstance(value, list) and not value:
            continue
        try:
            states[name] = convert(value)
        except (TypeError, ValueError) as error:
            raise RNGStateError(f"{name}: the RNGState's {field} is malformed: {error}") from error
    return states


def _own_device_state(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the current device's state out of one, or out of one for each visible device."""
    device = current_accelerator()
    if device is None:
        raise ValueError(f"{len(states)} accelerator states, but no accelerator here")
    if len(states) == 1:
        return bytes_to_int64(states[0])
    if device.index is None or len(states) != torch.accelerator.device_count():
        raise ValueError(
            f"{len(states)} accelerator states, expected 1 or one for each visible device"
        )
    return bytes_to_int64(states[device.index])
