"""NumPy's generators: the legacy one, a ``Generator`` over any bit generator, what it spawns from.

NumPy draws arrays without the interpreter's lock, under a lock of the bit generator. A state that
is read or written without it may be on no point of any stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np

from nemo_rng_dcp.generators.legacy_memory import LegacyMemory, contents, packed
from nemo_rng_dcp.generators.mt19937 import SEED_LIMIT, WORDS, MT19937State, check_length

_INTEGER_BYTES = 16  # PCG64's are the longest
# NumPy takes more, and then reads beyond its buffers.
_LIMITS = {"pos": WORDS, "buffer_pos": 4, "has_uint32": 1}

_SEQUENCE_HEAD = struct.Struct("<4I")  # pool size, words of entropy, of the spawn key, children
_SEQUENCE_WORDS = 12
_SEQUENCE_BYTES = _SEQUENCE_HEAD.size + 4 * _SEQUENCE_WORDS
_POOL_SIZES = range(4, 1025)  # NumPy takes none below, and allocates what it is told


class NumPyAdapter:
    """The global generator of ``numpy.random``, or another RandomState.

    Packed: 2,512 bytes, see :meth:`MT19937State.to_bytes`. A state of :meth:`get` is the same. The
    global generator may run on another algorithm since NumPy 1.24
    (``numpy.random.set_bit_generator``), which is refused.
    """

    kind = "numpy"

    def __init__(self, generator: np.random.RandomState) -> None:
        self._generator: Any = generator
        self._place: tuple[Any, LegacyMemory | None] = None, None

    def get(self) -> bytes:
        generator, (bits, memory) = self._generator, self._memory()
        if memory is not None:
            return packed(*_locked(bits, memory.block.tobytes, memory.normal.tobytes))
        (state,) = _locked(bits, partial(generator.get_state, False))
        if state["bit_generator"] != "MT19937":
            default = "np.random.set_bit_generator(np.random.MT19937())"
            remedy = f"Give the default back at the start of the job: {default}"
            if generator is not np.random.mtrand._rand:
                remedy = "Register a numpy.random.Generator over it instead"
            raise ValueError(
                f"the generator runs {state['bit_generator']}, and only MT19937, NumPy's default, "
                f"can be stored. {remedy}"
            )
        return MT19937State.from_numpy(state).to_bytes()

    def set(self, state: bytes) -> None:
        bits, memory = self._memory()
        if memory is None:
            as_numpy = MT19937State.from_bytes(state).to_numpy()
            _locked(bits, partial(self._generator.set_state, as_numpy))
            return
        block, normal = contents(state)
        _locked(
            bits,
            partial(memory.block.__setitem__, slice(None), block),
            partial(memory.normal.__setitem__, slice(None), normal),
        )

    def pack(self, state: bytes) -> bytes:
        return state

    def unpack(self, packed: bytes) -> bytes:
        MT19937State.from_bytes(packed)
        return packed

    def seed(self, value: int) -> None:
        if value < SEED_LIMIT:
            self._generator.seed(value)  # it takes the lock by itself
        else:
            self.set(MT19937State.from_seed(value).to_bytes())

    def _memory(self) -> tuple[Any, LegacyMemory | None]:
        """Return the bit generator that is in use, which may be exchanged, and its memory."""
        bits = self._generator._bit_generator
        if bits is not self._place[0]:
            self._place = bits, LegacyMemory.of(self._generator, bits)
        return self._place


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
        _locked(self._bit_generator, partial(setattr, self._bit_generator, "state", state))

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
            trial.__setstate__((trial.state, trial.seed_seq))
        except TypeError:
            return False
        return True

    def get(self) -> np.random.SeedSequence:
        return _copy(_sequence_of(self._bit_generator))

    def set(self, state: np.random.SeedSequence) -> None:
        _locked(self._bit_generator, partial(_exchange, self._bit_generator, _copy(state)))

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


def _locked(bit_generator: Any, *steps: Callable[[], Any]) -> list[Any]:
    """Return what functions return while no thread draws from a bit generator.

    All calls are made from C. A signal handler, which Python runs between two steps of Python code,
    thus never finds the lock held by its own thread: older NumPy's is not re-entrant.
    """
    lock, results = bit_generator.lock, list[Any]()
    try:
        results.extend(map(methodcaller("__call__"), (lock.acquire, *steps, lock.release)))
    except BaseException:
        if results:  # it was acquired, and a function raised
            lock.release()
        raise
    return results[1:-1]


def _state_of(bit_generator: Any) -> dict[str, Any]:
    state: dict[str, Any]
    (state,) = _locked(bit_generator, partial(getattr, bit_generator, "state"))
    return state


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
