"""NumPy's generators: the legacy one, and a ``Generator`` over each of NumPy's bit generators."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_rng_dcp.generators.mt19937 import (
    SEED_LIMIT,
    WORDS,
    MT19937State,
    check_length,
    pack_gauss,
    to_words,
)

ALGORITHMS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
"""What NumPy ships. A place in this list, counted from 1, is a code in checkpoints: append only."""

_NUMBERS = 1 + WORDS + 1  # the code, and the numbers of the largest state, MT19937's
_WORD = 2**64


class NumPyAdapter:
    """The module ``numpy.random``, whose functions are the global generator's, or a RandomState.

    Packed: 5,016 bytes, see :meth:`MT19937State.to_bytes`. The global generator may run on another
    algorithm since NumPy 1.24 (``numpy.random.set_bit_generator``), which is refused.
    """

    kind = "numpy"

    def __init__(self, generator: ModuleType | np.random.RandomState) -> None:
        self._generator: Any = generator

    def get(self) -> dict[str, Any]:
        state: dict[str, Any] = self._generator.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise ValueError(
                f"the generator runs {state['bit_generator']}, and only MT19937, NumPy's default, "
                "can be stored. Give the default back at the start of the job: "
                "np.random.set_bit_generator(np.random.MT19937())"
            )
        return state

    def set(self, state: dict[str, Any] | tuple[Any, ...]) -> None:
        self._generator.set_state(state)

    def pack(self, state: dict[str, Any]) -> bytes:
        inner = state["state"]
        numbers = np.empty(WORDS + 1, dtype=np.int64)
        numbers[:WORDS], numbers[WORDS] = inner["key"], inner["pos"]
        return numbers.tobytes() + pack_gauss(state["gauss"] if state["has_gauss"] else None)

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
    """A ``numpy.random.Generator`` over one of NumPy's own bit generators.

    Packed: 626 numbers of 8 bytes, whatever the algorithm: its code in :data:`ALGORITHMS`, the
    numbers of its state, zeros. How many children the generator has spawned is not stored.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._bit_generator = generator.bit_generator
        self.kind = f"numpy.{type(self._bit_generator).__name__}"

    def get(self) -> dict[str, Any]:
        state: dict[str, Any] = self._bit_generator.state  # type: ignore[assignment]
        return state

    def set(self, state: dict[str, Any]) -> None:
        self._bit_generator.state = state

    def pack(self, state: dict[str, Any]) -> bytes:
        name = state["bit_generator"]
        if name not in ALGORITHMS:
            raise ValueError(
                f"the bit generator is {name}, expected one of {', '.join(ALGORITHMS)}"
            )
        numbers = np.zeros(_NUMBERS, dtype=np.uint64)
        content = _numbers(state)
        numbers[0] = ALGORITHMS.index(name) + 1
        numbers[1 : 1 + len(content)] = content
        return numbers.tobytes()

    def unpack(self, packed: bytes) -> dict[str, Any]:
        check_length(packed, 8 * _NUMBERS)
        numbers = np.frombuffer(packed, dtype=np.uint64)
        name = type(self._bit_generator).__name__
        if numbers[0] != ALGORITHMS.index(name) + 1:
            raise ValueError(f"the state has algorithm code {numbers[0]}, which is not {name}'s")
        state = _state(name, numbers[1:])
        used = 1 + len(_numbers(state))
        if numbers[used:].any():
            raise ValueError(f"the state has more numbers than the {used - 1} of {name}")
        return state

    def seed(self, value: int) -> None:
        self.set(type(self._bit_generator)(value).state)  # type: ignore[arg-type]


def _numbers(state: dict[str, Any]) -> list[int]:
    """Return the numbers that make up a state, in a fixed order."""
    name, inner = state["bit_generator"], state["state"]
    if name == "MT19937":
        return [*inner["key"].tolist(), int(inner["pos"])]
    if name == "Philox":
        core = [*inner["counter"].tolist(), *inner["key"].tolist()]
        core += [*state["buffer"].tolist(), int(state["buffer_pos"])]
    elif name == "SFC64":
        core = inner["state"].tolist()
    else:
        core = [part for key in ("state", "inc") for part in _halves(int(inner[key]))]
    return [*core, int(state["has_uint32"]), int(state["uinteger"])]


def _state(name: str, numbers: npt.NDArray[np.uint64]) -> dict[str, Any]:
    """Return the state that :func:`_numbers` was given, refusing values that NumPy would take."""
    if name == "MT19937":
        position = int(numbers[WORDS])
        words = to_words(numbers[:WORDS])
        MT19937State(words, position)
        return {"bit_generator": name, "state": {"key": words, "pos": position}}
    state: dict[str, Any] = {"bit_generator": name}
    if name == "Philox":
        state["state"] = {"counter": numbers[:4].copy(), "key": numbers[4:6].copy()}
        state["buffer"], state["buffer_pos"] = numbers[6:10].copy(), int(numbers[10])
        if state["buffer_pos"] > 4:
            raise ValueError(f"the buffer position is {state['buffer_pos']}, expected 0 to 4")
        end = 11
    elif name == "SFC64":
        state["state"], end = {"state": numbers[:4].copy()}, 4
    else:
        low, high, inc_low, inc_high = (int(number) for number in numbers[:4])
        state["state"] = {"state": low + high * _WORD, "inc": inc_low + inc_high * _WORD}
        if inc_low % 2 == 0:
            raise ValueError("the increment is even, expected an odd number")
        end = 4
    has_uint32, uinteger = int(numbers[end]), int(numbers[end + 1])
    if has_uint32 > 1 or uinteger >= 2**32:
        raise ValueError(
            f"the spare half word is {uinteger} with flag {has_uint32}, expected below 2**32 with "
            "flag 0 or 1"
        )
    return {**state, "has_uint32": has_uint32, "uinteger": uinteger}


def _halves(number: int) -> tuple[int, int]:
    return number % _WORD, number // _WORD
