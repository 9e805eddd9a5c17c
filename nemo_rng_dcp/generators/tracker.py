"""The states that a tracker keeps by name, such as Megatron-Core's, as registered generators."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from nemo_rng_dcp.errors import warn
from nemo_rng_dcp.generators.adapter import GeneratorAdapter
from nemo_rng_dcp.generators.device import own_device
from nemo_rng_dcp.generators.mt19937 import TORCH_LENGTH
from nemo_rng_dcp.generators.numpy_random import NumPyAdapter
from nemo_rng_dcp.generators.python_random import PythonAdapter
from nemo_rng_dcp.generators.torch_random import TorchAdapter


class Tracker(Protocol):
    """An object that keeps states of random streams by name.

    A state is what ``torch.get_rng_state()``, ``torch.cuda.get_rng_state()``, ``random.getstate()``
    or ``numpy.random.get_state()`` gives, or a ``torch.Generator``, as CUDA graphs need.
    """

    def get_states(self) -> dict[str, Any]:
        """Return the states by name."""
        ...

    def set_states(self, states: dict[str, Any]) -> None:
        """Take these states instead."""
        ...


def tracker_generators(tracker: Tracker, *names: str) -> dict[str, GeneratorAdapter]:
    """Return the states of a tracker for ``StatefulRNG(generators=...)``; moves none of them.

    For the ``CudaRNGStatesTracker`` of Megatron-Core and Transformer Engine, and for any object
    with their ``get_states`` and ``set_states``. Call it when the tracker has its states, in
    Megatron-Core after ``model_parallel_cuda_manual_seed``. Nothing communicates.

    A name that the tracker is given later is not stored, and the next save or load says so in an
    ``RNGStateWarning``.

    Args:
        tracker: The tracker.
        names: The states to take, as the tracker names them; none: all of them.

    Returns:
        By name the adapters, ``model_parallel_rng`` for ``model-parallel-rng``. A
        ``torch.Generator`` is restored in place, other states by ``set_states``.

    Raises:
        TypeError: ``tracker`` has no ``get_states`` and ``set_states``, or a state is of another
            kind.
        ValueError: The tracker has no such state, or none at all.

    Example:
        >>> from nemo_rng_dcp import StatefulRNG
        >>> class Tracker:
        ...     states = {"model-parallel-rng": torch.Generator().manual_seed(1).get_state()}
        ...
        ...     def get_states(self):
        ...         return dict(self.states)
        ...
        ...     def set_states(self, states):
        ...         self.states = states
        >>> rng = StatefulRNG(seed=42, generators=tracker_generators(Tracker()))
        >>> "model_parallel_rng" in rng.fingerprint()
        True
    """
    if not (hasattr(tracker, "get_states") and hasattr(tracker, "set_states")):
        raise TypeError(
            f"the tracker is a {type(tracker).__name__}, expected an object with get_states() and "
            "set_states()"
        )
    states = tracker.get_states()
    absent = [name for name in names if name not in states]
    if absent or not states:
        raise ValueError(
            f"the tracker has no state {', '.join(absent)}, only {sorted(states)}: add its states "
            "first, in Megatron-Core by model_parallel_cuda_manual_seed()"
        )
    known = set(states)
    return {_identifier(name): TrackerAdapter(tracker, name, known) for name in names or states}


class TrackerAdapter:
    """One state of a tracker. Packed as a generator of its kind would be.

    Args:
        tracker: The tracker.
        name: The state's name in it.
        known: The tracker's names of which nothing is to be said. Others are added when it is.
    """

    def __init__(self, tracker: Tracker, name: str, known: set[str]) -> None:
        self._tracker, self._name, self._known = tracker, name, known
        # Its generator never draws: it takes states, checks them and gives them back.
        self._adapter, self._own_form, self._take = _holder(name, self._state())
        self.kind = self._adapter.kind

    def get(self) -> Any:
        new = sorted(self._tracker.get_states().keys() - self._known)
        if new:
            self._known.update(new)
            warn(
                f"the tracker was given {', '.join(new)} after tracker_generators(), so that is "
                "not stored: construct StatefulRNG when the tracker has all of its states"
            )
        state = self._state()
        if isinstance(state, torch.Generator):
            return state.get_state()
        try:
            self._take(state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the tracker's {self._name} is no such state: {error}") from error
        return self._adapter.get()

    def set(self, state: Any) -> None:
        kept = self._state()
        if isinstance(kept, torch.Generator):
            # In place: a CUDA graph that was captured draws from this object.
            kept.set_state(state)
            return
        self._adapter.set(state)
        self._tracker.set_states({**self._tracker.get_states(), self._name: self._own_form()})

    def pack(self, state: Any) -> bytes:
        return self._adapter.pack(state)

    def unpack(self, packed: bytes) -> Any:
        return self._adapter.unpack(packed)

    def seed(self, value: int) -> None:
        self._adapter.seed(value)
        self.set(self._adapter.get())

    def _state(self) -> Any:
        states = self._tracker.get_states()
        if self._name not in states:
            raise ValueError(f"the tracker has no state {self._name} any more, only {list(states)}")
        return states[self._name]


def _identifier(name: str) -> str:
    return "".join(c if c.isidentifier() or c.isdigit() else "_" for c in name)


def _holder(
    name: str, state: Any
) -> tuple[GeneratorAdapter, Callable[[], Any], Callable[[Any], object]]:
    """Return a generator for such a state, and what gives and takes the state in the same form."""
    if isinstance(state, (torch.Generator, torch.Tensor)):
        generator = torch.Generator(_device_of(state))
        return TorchAdapter(generator), generator.get_state, generator.set_state
    if isinstance(state, tuple) and state[:1] == ("MT19937",):
        numpy = np.random.RandomState()
        return NumPyAdapter(numpy), numpy.get_state, numpy.set_state
    if isinstance(state, tuple) and state[:1] == (3,):
        python = random.Random()
        return PythonAdapter(python), python.getstate, python.setstate
    raise TypeError(
        f"the tracker's {name} is a {type(state).__name__}, expected a state as torch, Python's "
        "random or NumPy's legacy generator gives it, or a torch.Generator"
    )


def _device_of(state: torch.Generator | torch.Tensor) -> torch.device | None:
    if isinstance(state, torch.Generator):
        return state.device
    return None if state.numel() == TORCH_LENGTH else own_device()
