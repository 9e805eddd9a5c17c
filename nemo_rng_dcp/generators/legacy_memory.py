"""The memory in which a ``numpy.random.RandomState`` has its state.

NumPy gives and takes 624 words one by one, in 60 us. As a block they are copied in 5.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import Any, NamedTuple

import numpy as np

from nemo_rng_dcp.generators.mt19937 import WORDS

_BLOCK = struct.Struct(f"={WORDS + 1}I")  # of MT19937: the words, and the position as an int
_NORMAL = struct.Struct("@id")  # of RandomState: whether a normal is cached, and which
_PACKED_NORMAL = struct.Struct("=Id")


class LegacyMemory(NamedTuple):
    """Where a generator's state is. To be used while its bit generator lives and is locked.

    What is called of the views is written in C and keeps the interpreter's lock: no other Python
    code runs in between.

    Attributes:
        block: Of the bit generator.
        normal: Of the generator itself.
    """

    block: memoryview
    normal: memoryview

    @classmethod
    def of(cls, generator: np.random.RandomState, bits: Any) -> LegacyMemory | None:
        """Return the memory of a generator over a bit generator.

        ``None``: it runs another algorithm than MT19937, or NumPy has its state elsewhere.
        """
        if _PLACE is None or type(bits) is not np.random.MT19937:
            return None
        block = _view(bits.ctypes.state_address, _BLOCK.size)
        return cls(block, _view(id(generator) + _PLACE, _NORMAL.size))


def packed(block: bytes, normal: bytes) -> bytes:
    """Return the contents of both as :meth:`MT19937State.to_bytes` has them."""
    has_gauss, gauss = _NORMAL.unpack(normal)
    return block + _PACKED_NORMAL.pack(*((1, gauss) if has_gauss else (0, 0.0)))


def contents(state: bytes) -> tuple[bytes, bytes]:
    """Return the contents of both by what :func:`packed` returned."""
    return state[: _BLOCK.size], _NORMAL.pack(*_PACKED_NORMAL.unpack_from(state, _BLOCK.size))


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _place_of_the_normal() -> int | None:
    """Return how far into a RandomState its cached normal is.

    NumPy says where a bit generator has its state, but not in which order, and of the normal
    nothing. So both are looked for in a generator whose state is known. ``None``: they are not
    there, as in another version of NumPy.
    """
    if sys.implementation.name != "cpython":
        return None  # id() is no address
    trial = np.random.RandomState(1)
    trial.standard_normal()
    state: Any = trial.get_state()
    _, words, position, _, gauss = state
    block = ctypes.string_at(trial._bit_generator.ctypes.state_address, _BLOCK.size)
    if block != _BLOCK.pack(*words.tolist(), position):
        return None
    of_trial = _view(id(trial), np.random.RandomState.__basicsize__)
    place = of_trial.tobytes().find(_NORMAL.pack(1, gauss))
    trial.standard_normal()  # takes it out again
    # From -1, if it was not found, there is one byte.
    if of_trial[place:][: _NORMAL.size] != _NORMAL.pack(0, 0.0):
        return None
    return place


_PLACE = _place_of_the_normal()
