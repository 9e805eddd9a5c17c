"""The one algorithm behind Python's, NumPy's and torch CPU's generators: MT19937.

Its state is a block of 624 32-bit words and a position in it: how many words of the block were
drawn. A draw past the end replaces the whole block ("regenerates") and starts again at word 0.
Each library wraps those same words in a format of its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

WORDS = 624
"""Words in one block."""

SEED_LIMIT = 2**32
"""The libraries' own seeding functions use seeds below this whole; ``numpy.random.seed`` takes no
larger ones."""

PACKED = struct.Struct(f"={WORDS + 2}Id")
"""What :meth:`MT19937State.to_bytes` writes: words, position, has-gauss, gaussian."""

_PYTHON_VERSION = 3  # the first element of random.getstate() since Python 3.2
_PYTHON_WORDS = struct.Struct(f"={WORDS}I")

# at::CPUGeneratorImplState (aten/src/ATen/CPUGeneratorImpl.cpp): seed, left, seeded, next, then
# 624 words of 64 bits each, then 40 bytes of cached normals, which are no part of the algorithm.
_TORCH_HEAD = struct.Struct("=QiiQ")
_TORCH_WORDS = slice(_TORCH_HEAD.size, _TORCH_HEAD.size + 8 * WORDS)
TORCH_LENGTH = _TORCH_WORDS.stop + 40
"""Bytes of ``torch.get_rng_state()``."""


@dataclass(frozen=True, eq=False)
class MT19937State:
    """A position in an MT19937 stream, convertible to and from each library that runs on it.

    From the same state, Python (``getrandbits(32)``), NumPy (``MT19937.random_raw()``) and torch
    produce the same raw 32-bit words; torch shows them through ``random_(0, 2**28 - 1)``, which
    takes ``word % range``. What does **not** match is everything made *from* words: each library
    builds floats, normals, bounded integers and permutations in its own way, so
    ``random.random()`` and ``torch.rand(())`` differ even though they read one stream.

    Args:
        words: The current block, uint32, shape ``(624,)``.
        position: Words of the block already drawn, 0 to 624.
        gauss: The second of a pair of normals, kept for the next call by Python's
            ``random.gauss`` and NumPy's legacy normals; ``None`` when there is none. Torch keeps
            its cached normals elsewhere, so :meth:`from_torch` gives ``None``.

    Raises:
        ValueError: A field is outside its range.

    Example:
        >>> import random, numpy as np
        >>> state = MT19937State.from_python(random.Random(7).getstate())
        >>> shared = np.random.RandomState()
        >>> shared.set_state(state.to_numpy())
        >>> int(shared.randint(2**32, dtype=np.uint32)) == random.Random(7).getrandbits(32)
        True
    """

    words: npt.NDArray[np.uint32]
    position: int
    gauss: float | None = None

    def __post_init__(self) -> None:
        if self.words.dtype != np.uint32 or self.words.shape != (WORDS,):
            raise ValueError(
                f"the words are {self.words.dtype} {self.words.shape}, expected uint32 ({WORDS},)"
            )
        if not np.count_nonzero(self.words):
            raise ValueError("all words are zero, a state from which MT19937 draws only zeros")
        if not isinstance(self.position, int) or not 0 <= self.position <= WORDS:
            raise ValueError(f"the position is {self.position}, expected 0 to {WORDS}")
        if self.gauss is not None and not isinstance(self.gauss, float):
            raise ValueError(f"the cached gaussian is {self.gauss!r}, expected a float")

    @classmethod
    def from_seed(cls, seed: int) -> MT19937State:
        """Return the start of a stream that depends on every bit of a 64-bit seed.

        Args:
            seed: ``0 <= seed < 2**64``. ``numpy.random.seed([seed % 2**32, seed >> 32])`` gives
                the same stream; ``numpy.random.seed`` and ``torch.manual_seed`` alone would only
                see the lower 32 bits.
        """
        return cls.from_numpy(np.random.RandomState([seed % 2**32, seed >> 32]).get_state())

    @classmethod
    def from_bytes(cls, packed: bytes) -> MT19937State:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: Another length, or a value out of range.
        """
        check_length(packed, PACKED.size)
        numbers = np.frombuffer(bytearray(packed), dtype=np.uint32)  # the words may be written
        has_gauss, gauss = int(numbers[WORDS + 1]), packed[-8:]
        if has_gauss > 1 or (not has_gauss and any(gauss)):
            raise ValueError(f"the has-gauss flag is {has_gauss} and the gaussian {gauss.hex()}")
        cached = struct.unpack("=d", gauss)[0] if has_gauss else None
        return cls(numbers[:WORDS], int(numbers[WORDS]), cached)

    def to_bytes(self) -> bytes:
        """Return the state as 2,512 bytes: words, position, has-gauss, gaussian.

        All are uint32 but the gaussian, a float64, which is 0 when there is none.
        """
        gauss = 0.0 if self.gauss is None else self.gauss
        return PACKED.pack(*self.words.tolist(), self.position, self.gauss is not None, gauss)

    @classmethod
    def from_python(cls, state: tuple[Any, ...]) -> MT19937State:
        """Convert what ``random.getstate()`` gives.

        Raises:
            ValueError: Not a version 3 state, or a value out of range.
        """
        if not isinstance(state, tuple) or len(state) != 3 or state[0] != _PYTHON_VERSION:
            raise ValueError("not a state of Python's random: expected (3, (...), gauss_next)")
        _, internal, gauss = state
        if not isinstance(internal, tuple) or len(internal) != WORDS + 1:
            raise ValueError(f"not a state of Python's random: expected {WORDS + 1} integers")
        try:
            words = np.frombuffer(_PYTHON_WORDS.pack(*internal[:WORDS]), dtype=np.uint32)
        except struct.error as error:
            raise ValueError(f"not a state of Python's random: {error}") from error
        return cls(words, internal[WORDS], gauss)

    def to_python(self) -> tuple[int, tuple[int, ...], float | None]:
        """Return the state as ``random.setstate()`` takes it."""
        return _PYTHON_VERSION, (*self.words.tolist(), self.position), self.gauss

    @classmethod
    def from_numpy(cls, state: dict[str, Any] | tuple[Any, ...]) -> MT19937State:
        """Convert what ``numpy.random.get_state()`` gives, as a tuple or (``legacy=False``) a dict.

        Raises:
            ValueError: A state of another bit generator, or a value out of range.
        """
        if isinstance(state, dict):
            inner = state.get("state")
            inner = inner if isinstance(inner, dict) else {}
            state = (
                state.get("bit_generator"),
                inner.get("key"),
                inner.get("pos"),
                state.get("has_gauss", 0),
                state.get("gauss", 0.0),
            )
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != "MT19937":
            found = state[0] if isinstance(state, tuple) and state else type(state).__name__
            raise ValueError(f"not an MT19937 state of NumPy: found {found!r}")
        _, key, position, has_gauss, gauss = state
        if has_gauss not in (0, 1):
            raise ValueError(f"the has-gauss flag is {has_gauss}, expected 0 or 1")
        if isinstance(position, np.integer):
            position = int(position)
        return cls(to_words(np.asarray(key)), position, float(gauss) if has_gauss else None)

    def to_numpy(self) -> tuple[str, npt.NDArray[np.uint32], int, int, float]:
        """Return the state as ``numpy.random.set_state()`` takes it."""
        has_gauss, gauss = (0, 0.0) if self.gauss is None else (1, self.gauss)
        return "MT19937", self.words, self.position, has_gauss, gauss

    @classmethod
    def from_torch(cls, state: torch.Tensor) -> MT19937State:
        """Convert what ``torch.get_rng_state()`` or a CPU ``torch.Generator.get_state()`` gives.

        Args:
            state: uint8, shape ``(5056,)``. Its cached normals are left out.

        Raises:
            ValueError: Another dtype or shape, or a value that torch would refuse or truncate.
        """
        if state.dtype != torch.uint8 or state.shape != (TORCH_LENGTH,):
            raise ValueError(
                f"the state is {state.dtype} {tuple(state.shape)}, expected torch.uint8 "
                f"({TORCH_LENGTH},)"
            )
        raw = state.contiguous().numpy()
        _, left, seeded, following = _TORCH_HEAD.unpack(raw[: _TORCH_HEAD.size].tobytes())
        # torch counts down the draws until it regenerates: left == 1 means "at the next draw",
        # and then next is not read any more.
        fits = left == 1 or (1 < left <= WORDS and following == WORDS + 1 - left)
        if seeded != 1 or following > WORDS or not fits:
            raise ValueError(
                f"not a CPU state of torch: seeded {seeded}, left {left}, next {following}"
            )
        words = to_words(raw[_TORCH_WORDS].view(np.uint64))
        return cls(words, WORDS + 1 - left)

    def to_torch(self, initial_seed: int = 0) -> torch.Tensor:
        """Return the state as ``torch.set_rng_state()`` takes it: uint8, shape ``(5056,)``.

        Its cached normals are empty.

        Args:
            initial_seed: What ``torch.initial_seed()`` will say, ``0 <= initial_seed < 2**64``.

        Raises:
            ValueError: The position is 0, which torch cannot express.
        """
        words, position = self.words, self.position
        if position == 0:
            raise ValueError("torch has no state in which nothing of a block is drawn")
        raw = np.zeros(TORCH_LENGTH, dtype=np.uint8)
        head = _TORCH_HEAD.pack(initial_seed, WORDS + 1 - position, 1, position % WORDS)
        raw[: _TORCH_HEAD.size] = np.frombuffer(head, dtype=np.uint8)
        raw[_TORCH_WORDS] = words.astype(np.uint64).view(np.uint8)
        return torch.from_numpy(raw)


def check_length(packed: bytes, length: int) -> None:
    """Raise ``ValueError`` unless a packed state has this many bytes."""
    if len(packed) != length:
        raise ValueError(f"the state has {len(packed)} bytes, expected {length}")


def to_words(numbers: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Narrow integers to uint32, refusing a value that does not fit instead of wrapping it."""
    if numbers.dtype != np.uint32:
        if numbers.dtype.kind not in "iu" or numbers.size == 0:
            raise ValueError(f"the words are {numbers.dtype} {numbers.shape}, expected integers")
        # What is negative keeps its sign, what is too large its upper bits.
        if int(np.bitwise_or.reduce(numbers)) >> 32:
            low, high = int(numbers.min()), int(numbers.max())
            bad = low if low < 0 else high
            raise ValueError(f"a word is {bad}, expected 0 to 2**32 - 1")
    words: npt.NDArray[np.uint32] = numbers.astype(np.uint32)
    return words
