"""NumPy's generators: the legacy one, a ``Generator`` over any bit generator, what it spawns from.

NumPy draws arrays without the interpreter's lock, under a lock of the bit generator. A state that
is read or written without it may be on no point of any stream.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from nemo_rng_dcp.generators.mt19937 import (
    SEED_LIMIT,
    WORDS,
    MT19937State,
    check_length,
)

_Result = TypeVar("_Result")

_INTEGER_BYTES = 16  # PCG64's are the longest
# NumPy takes more, and then reads beyond its buffers.
_LIMITS = {"pos": WORDS, "buffer_pos": 4, "has_uint32": 1}

_SEQUENCE_HEAD = struct.Struct("<4I")  # pool size, words of entropy, of the spawn key, children
_SEQUENCE_WORDS = 12
_SEQUENCE_BYTES = _SEQUENCE_HEAD.size + 4 * _SEQUENCE_WORDS
_POOL_SIZES = range(4, 1025)  # NumPy takes none below, and allocates what it is told


class NumPyAdapter:
    """The module ``numpy.random``, whose functions are the global generator's, or a RandomState.

    Packed: 2,512 bytes, see :meth:`MT19937State.to_bytes`. The global generator may run on another
    algorithm since NumPy 1.24 (``numpy.random.set_bit_generator``), which is refused.
    """

    kind = "numpy"

    def __init__(self, generator: ModuleType | np.random.RandomState) -> None:
        self._generator: Any = generator

    def get(self) -> dict[str, Any]:
        state: dict[str, Any] = self._locked(self._generator.get_state, False)
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
            words, position = state["state"]["key"].tolist(), state["state"]["pos"]
            state = "MT19937", words, position, state["has_gauss"], state["gauss"]
        self._locked(self._generator.set_state, state)

    def pack(self, state: dict[str, Any]) -> bytes:
        inner = state["state"]
        words = np.asarray(inner["key"], dtype=np.uint32)
        numbers = np.array([inner["pos"], state["has_gauss"]], dtype=np.uint32)
        gauss = np.float64(state["gauss"] if state["has_gauss"] else 0)
        return bytes(words.tobytes() + numbers.tobytes() + gauss.tobytes())

    def unpack(self, packed: bytes) -> dict[str, Any]:
        name, words, position, has_gauss, gauss = MT19937State.from_bytes(packed).to_numpy()
        inner = {"key": words, "pos": position}
        return {"bit_generator": name, "state": inner, "has_gauss": has_gauss, "gauss": gauss}

    def is_at(self, state: dict[str, Any]) -> bool:
        """Return whether the stream has not moved since :meth:`get`; no is "look", and costs that.

        NumPy gives a state word by word, in 30 us; this takes one. It does not see where somebody
        set the state back by a cached normal, which moves no word.
        """
        bits = self._bit_generator()
        # A cached normal can be drawn without a word.
        if state["has_gauss"] or type(bits) is not np.random.MT19937:
            return False
        words, position = state["state"]["key"], state["state"]["pos"]
        with bits.lock:
            memory = ctypes.string_at(bits.ctypes.state_address, 4 * WORDS + 4)
        return bool(memory == words.tobytes() + int(position).to_bytes(4, sys.byteorder))

    def glance(self, state: dict[str, Any]) -> tuple[object, ...]:
        """Return what differs wherever two states differ, but for one case in 2**96."""
        inner = state["state"]
        # The first word is the same after every seed.
        return inner["key"][1:4].tobytes(), inner["pos"], state["has_gauss"], state["gauss"]

    def seed(self, value: int) -> None:
        if value < SEED_LIMIT:
            self._generator.seed(value)  # it takes the lock by itself
        else:
            self.set(MT19937State.from_seed(value).to_numpy())

    def _locked(self, function: Callable[..., _Result], argument: Any) -> _Result:
        return _locked(self._bit_generator(), function, argument)

    def _bit_generator(self) -> Any:
        # The module's is asked for each time: it may be exchanged.
        get_bit_generator = getattr(self._generator, "get_bit_generator", None)
        return get_bit_generator() if get_bit_generator else self._generator._bit_generator


class NumPyGeneratorAdapter:
    """A ``numpy.random.Generator`` over any bit generator whose state is integers and arrays.

    Packed: what ``bit_generator.state`` holds, in the alphabetical order of the names: the
    algorithm's name in ASCII, an integer as 16 bytes, little-endian, an array as its own bytes.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._bit_generator: Any = generator.bit_generator
        self.kind = f"numpy.{type(self._bit_generator).__name__}"

    def get(self) -> dict[str, Any]:
        return _state_of(self._bit_generator)

    def set(self, state: dict[str, Any]) -> None:
        _locked(self._bit_generator, setattr, self._bit_generator, "state", state)

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


class SeedSequenceAdapter:
    """The ``SeedSequence`` that a ``numpy.random.Generator`` spawns from, with its child count.

    Restored in place of the generator's own, so that ``Generator.spawn()`` goes on. It moves no
    stream. Packed: 64 bytes, little-endian uint32: pool size, words of entropy, words of the spawn
    key, children spawned; then those words, as NumPy mixes them, and zeros.
    """

    kind = "numpy.SeedSequence"

    def __init__(self, generator: np.random.Generator) -> None:
        self._bit_generator: Any = generator.bit_generator

    @staticmethod
    def fits(generator: np.random.Generator) -> bool:
        """Return whether NumPy can read and put back what a generator spawns from.

        It puts nothing back before NumPy 2, and other classes keep children in their own way.
        """
        if type(_sequence_of(generator.bit_generator)) is not np.random.SeedSequence:
            return False
        trial: Any = np.random.PCG64()
        try:
            trial.__setstate__((trial.state, np.random.SeedSequence(5)))
        except TypeError:
            return False
        return True

    def get(self) -> np.random.SeedSequence:
        return _copy(_sequence_of(self._bit_generator))

    def set(self, state: np.random.SeedSequence) -> None:
        _locked(self._bit_generator, _exchange, self._bit_generator, _copy(state))

    def pack(self, state: np.random.SeedSequence) -> bytes:
        entropy, key = _words(state.entropy), _words(state.spawn_key)
        words = [*entropy, *key]
        if len(words) > _SEQUENCE_WORDS or state.pool_size not in _POOL_SIZES:
            raise ValueError(
                f"its SeedSequence has {len(words)} words of 32 bits in entropy and spawn key and "
                f"a pool of {state.pool_size}, and there is room for {_SEQUENCE_WORDS} and "
                f"{_POOL_SIZES.stop - 1}: make the generator from fewer, such as by "
                "numpy.random.default_rng(derive_seed(...))"
            )
        head = state.pool_size, len(entropy), len(key), state.n_children_spawned
        content = _SEQUENCE_HEAD.pack(*head) + np.array(words, "<u4").tobytes()
        return content.ljust(_SEQUENCE_BYTES, b"\0")

    def unpack(self, packed: bytes) -> np.random.SeedSequence:
        check_length(packed, _SEQUENCE_BYTES)
        pool_size, entropy, key, children = _SEQUENCE_HEAD.unpack_from(packed)
        words = np.frombuffer(packed, "<u4", offset=_SEQUENCE_HEAD.size).tolist()
        if (
            entropy + key > _SEQUENCE_WORDS
            or any(words[entropy + key :])
            or pool_size not in _POOL_SIZES
        ):
            raise ValueError(
                f"a SeedSequence of {entropy} and {key} words and a pool of {pool_size} makes no "
                "sense"
            )
        return np.random.SeedSequence(
            _number(words[:entropy]),
            spawn_key=tuple(words[entropy : entropy + key]),
            pool_size=pool_size,
            n_children_spawned=children,
        )

    def seed(self, value: int) -> None:
        self.set(np.random.SeedSequence(value))


def _locked(bit_generator: Any, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a function while no thread draws from a bit generator.

    All three calls are made from C. A signal handler, which Python runs between two steps of Python
    code, thus never finds the lock held by its own thread: older NumPy's is not re-entrant.
    """
    lock, results = bit_generator.lock, list[Any]()
    steps = lock.acquire, partial(function, *arguments), lock.release
    try:
        results.extend(map(methodcaller("__call__"), steps))
    except BaseException:
        if len(results) == 1:  # it was acquired, and the function raised
            lock.release()
        raise
    result: _Result = results[1]
    return result


def _state_of(bit_generator: Any) -> dict[str, Any]:
    return _locked(bit_generator, getattr, bit_generator, "state")


def _exchange(bit_generator: Any, sequence: np.random.SeedSequence) -> None:
    bit_generator.__setstate__((bit_generator.state, sequence))


def _copy(sequence: np.random.SeedSequence) -> np.random.SeedSequence:
    """Return another one, since a generator's own counts on."""
    return np.random.SeedSequence(
        sequence.entropy,
        spawn_key=sequence.spawn_key,
        pool_size=sequence.pool_size,
        n_children_spawned=sequence.n_children_spawned,
    )


def _sequence_of(bit_generator: Any) -> Any:
    return getattr(bit_generator, "seed_seq", None)


def _words(numbers: Any) -> list[int]:
    """Return entropy or a spawn key as the words that NumPy makes of it."""
    if not isinstance(numbers, (int, np.integer)):
        return [word for number in numbers for word in _words(number)]
    words = [int(numbers) % 2**32]
    while numbers := int(numbers) >> 32:
        words.append(numbers % 2**32)
    return words


def _number(words: list[int]) -> int | list[int]:
    """Return the entropy with these words: a number, where there is one."""
    if not words or (len(words) > 1 and not words[-1]):
        return words
    return sum(word << 32 * place for place, word in enumerate(words))


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
