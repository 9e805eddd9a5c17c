"""NumPy's generators: the legacy one, and a ``Generator`` over each of NumPy's bit generators."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from nemo_rng_dcp.generators.mt19937 import (
    SEED_LIMIT,
    WORDS,
    MT19937State,
    check_length,
)

_INTEGER_BYTES = 16  # PCG64's are the longest
# NumPy takes more, and then reads beyond its buffers.
_LIMITS = {"pos": WORDS, "buffer_pos": 4, "has_uint32": 1}


class NumPyAdapter:
    """The module ``numpy.random``, whose functions are the global generator's, or a RandomState.

    Packed: 2,512 bytes, see :meth:`MT19937State.to_bytes`. The global generator may run on another
    algorithm since NumPy 1.24 (``numpy.random.set_bit_generator``), which is refused.
    """

    kind = "numpy"

    def __init__(self, generator: ModuleType | np.random.RandomState) -> None:
        self._generator: Any = generator

    def get(self) -> dict[str, Any]:
        state: dict[str, Any] = self._generator.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            default = "np.random.set_bit_generator(np.random.MT19937())"
            remedy = f"Give the default back at the start of the job: {default}"
            if isinstance(self._generator, np.random.RandomState):
                remedy = "Register a numpy.random.Generator over it instead"
            raise ValueError(
                f"the generator runs {state['bit_generator']}, and only MT19937, NumPy's default, "
                f"can be stored. {remedy}"
            )
        return state

    def set(self, state: dict[str, Any] | tuple[Any, ...]) -> None:
        if isinstance(state, dict):
            # NumPy takes the words one by one, from a list three times as fast as from an array.
            inner = state["state"]
            state = {**state, "state": {**inner, "key": inner["key"].tolist()}}
        self._generator.set_state(state)

    def pack(self, state: dict[str, Any]) -> bytes:
        inner = state["state"]
        numbers = np.array([inner["pos"], state["has_gauss"]], dtype=np.uint32)
        gauss = np.float64(state["gauss"] if state["has_gauss"] else 0)
        return bytes(inner["key"].tobytes() + numbers.tobytes() + gauss.tobytes())

    def unpack(self, packed: bytes) -> tuple[Any, ...]:
        name, words, *rest = MT19937State.from_bytes(packed).to_numpy()
        # NumPy takes the words one by one, from a list three times as fast as from an array.
        return name, words.tolist(), *rest

    def seed(self, value: int) -> None:
        if value < SEED_LIMIT:
            self._generator.seed(value)
        else:
            self._generator.set_state(MT19937State.from_seed(value).to_numpy())


class NumPyGeneratorAdapter:
    """A ``numpy.random.Generator`` over any bit generator whose state is integers and arrays.

    Packed: what ``bit_generator.state`` holds, in the alphabetical order of the names: the
    algorithm's name in ASCII, an integer as 16 bytes, little-endian, an array as its own bytes. How
    many children the generator has spawned is not stored.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._bit_generator: Any = generator.bit_generator
        self.kind = f"numpy.{type(self._bit_generator).__name__}"

    def get(self) -> dict[str, Any]:
        state: dict[str, Any] = self._bit_generator.state
        return state

    def set(self, state: dict[str, Any]) -> None:
        self._bit_generator.state = state

    def pack(self, state: dict[str, Any]) -> bytes:
        return b"".join(_to_bytes(values[name]) for values, name in _leaves(state))

    def unpack(self, packed: bytes) -> dict[str, Any]:
        state, place = self.get(), 0
        check_length(packed, len(self.pack(state)))
        for values, name in _leaves(state):
            value = values[name]
            content = packed[place : (place := place + len(_to_bytes(value)))]
            if isinstance(value, np.ndarray):
                values[name] = np.frombuffer(content, value.dtype).copy()
            elif not isinstance(value, str):
                values[name] = int.from_bytes(content, "little")
                if name in _LIMITS and values[name] > _LIMITS[name]:
                    raise ValueError(f"{name} is {values[name]}, expected 0 to {_LIMITS[name]}")
        trial = type(self._bit_generator)()
        try:
            trial.state = state
        except (OverflowError, ValueError) as error:
            raise ValueError(f"NumPy refuses the state: {error}") from error
        if self.pack(trial.state) != packed:
            raise ValueError("NumPy takes the state only in part: some of it is out of range")
        return state

    def seed(self, value: int) -> None:
        self.set(type(self._bit_generator)(value).state)


def _leaves(state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the values of a bit generator's state are: the dict, and the key in it."""
    for name in sorted(state):
        if isinstance(state[name], dict):
            yield from _leaves(state[name])
        else:
            yield state, name


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if not isinstance(value, (int, np.integer)):
        raise ValueError(f"the bit generator's state holds {value!r:.40}, expected integers")
    return int(value).to_bytes(_INTEGER_BYTES, "little")
