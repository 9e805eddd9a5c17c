"""One small adapter per kind of generator: its state as an int64 tensor, and back."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from nemo_rng_dcp import bit_generators
from nemo_rng_dcp.mt19937 import MT19937State
from nemo_rng_dcp.seeding import SEED_LIMIT


@runtime_checkable
class GeneratorAdapter(Protocol):
    """How one generator is stored. None of the methods communicates."""

    def read(self) -> torch.Tensor:
        """Return the state without moving the stream: int64, 1-D, always of the same length.

        The tensor is on the CPU and the caller's own: later draws must not change it.

        Raises:
            ValueError: The generator is in a state that cannot be stored.
        """
        ...

    def check(self, state: torch.Tensor) -> None:
        """Raise ``ValueError`` unless ``state`` is one that :meth:`write` will take.

        The generator is not touched, and :meth:`read` succeeded on it or will before the write.
        """
        ...

    def write(self, state: torch.Tensor) -> None:
        """Put the generator into a state that was checked; ``state`` remains the caller's own."""
        ...

    def seed(self, value: int) -> None:
        """Start a stream that depends on every bit of ``value``, ``0 <= value < 2**64``.

        Below 2**32 it is the stream that the generator's own library starts from that seed.
        """
        ...


def read_state(generator: GeneratorAdapter) -> torch.Tensor:
    """Return what :meth:`GeneratorAdapter.read` gives; moves no stream, does not communicate.

    Returns:
        int64, shape ``(n,)``, n >= 1, on the CPU.

    Raises:
        ValueError: The state cannot be stored, or is something else: sealed all the same, it would
            be saved in silence and refused by every load.
    """
    state = generator.read()
    if not (
        isinstance(state, torch.Tensor)
        and state.is_cpu
        and state.dtype == torch.int64
        and state.ndim == 1
        and len(state)
    ):
        raise ValueError(
            f"read() gave {state!r:.80}, expected int64 of shape (n,), n >= 1, on the CPU"
        )
    return state


class PythonAdapter:
    """Python's ``random``: the module, whose functions are the global generator's, or a Random.

    State: int64 ``(627,)``, see :meth:`MT19937State.to_tensor`.
    """

    def __init__(self, generator: ModuleType | random.Random) -> None:
        self._generator: Any = generator

    def read(self) -> torch.Tensor:
        return MT19937State.from_python(self._generator.getstate()).to_tensor()

    def check(self, state: torch.Tensor) -> None:
        MT19937State.from_tensor(state)

    def write(self, state: torch.Tensor) -> None:
        self._generator.setstate(MT19937State.from_tensor(state).to_python())

    def seed(self, value: int) -> None:
        self._generator.seed(value)


class NumPyAdapter:
    """NumPy's legacy generator: the module ``numpy.random``, whose functions are the global one's.

    State: int64 ``(627,)``, see :meth:`MT19937State.to_tensor`. The global generator may run on
    another algorithm since NumPy 1.24 (``numpy.random.set_bit_generator``); its state would not
    fit the table, so that is refused.
    """

    def __init__(self, generator: ModuleType | np.random.RandomState) -> None:
        self._generator: Any = generator

    def read(self) -> torch.Tensor:
        state = self._generator.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise ValueError(
                f"the generator runs {state['bit_generator']}, and only MT19937, NumPy's default, "
                "can be stored. Give the default back at the start of the job: "
                "np.random.set_bit_generator(np.random.MT19937())"
            )
        return MT19937State.from_numpy(state).to_tensor()

    def check(self, state: torch.Tensor) -> None:
        MT19937State.from_tensor(state)

    def write(self, state: torch.Tensor) -> None:
        self._set(MT19937State.from_tensor(state))

    def seed(self, value: int) -> None:
        if value < SEED_LIMIT:
            self._generator.seed(value)
        else:
            self._set(MT19937State.from_seed(value))

    def _set(self, state: MT19937State) -> None:
        name, words, *rest = state.to_numpy()
        # NumPy takes the words one by one, from a list three times as fast as from an array.
        self._generator.set_state((name, words.tolist(), *rest))


class NumPyGeneratorAdapter:
    """A ``numpy.random.Generator`` over one of NumPy's own bit generators.

    State: int64 ``(626,)``, see :func:`bit_generators.to_tensor`.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._bit_generator = generator.bit_generator

    def read(self) -> torch.Tensor:
        return bit_generators.to_tensor(self._state(self._bit_generator))

    def check(self, state: torch.Tensor) -> None:
        bit_generators.from_tensor(state, type(self._bit_generator).__name__)

    def write(self, state: torch.Tensor) -> None:
        name = type(self._bit_generator).__name__
        self._bit_generator.state = bit_generators.from_tensor(state, name)

    def seed(self, value: int) -> None:
        self._bit_generator.state = self._state(type(self._bit_generator)(value))

    @staticmethod
    def _state(bit_generator: Any) -> dict[str, Any]:
        state: dict[str, Any] = bit_generator.state
        return state
