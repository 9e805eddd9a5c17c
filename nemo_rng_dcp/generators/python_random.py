"""Python's ``random``."""

from __future__ import annotations

import random
import struct
from types import ModuleType
from typing import Any

from nemo_rng_dcp.generators.mt19937 import PACKED, WORDS, MT19937State


class PythonAdapter:
    """The module ``random``, whose functions are the global generator's, or a ``random.Random``.

    Packed: 2,512 bytes, see :meth:`MT19937State.to_bytes`.
    """

    kind = "python"

    def __init__(self, generator: ModuleType | random.Random) -> None:
        self._generator: Any = generator

    def get(self) -> tuple[Any, ...]:
        state: tuple[Any, ...] = self._generator.getstate()
        return state

    def set(self, state: tuple[Any, ...]) -> None:
        self._generator.setstate(state)

    def pack(self, state: tuple[Any, ...]) -> bytes:
        _, words_and_position, gauss = state
        try:
            # Four times as fast as through MT19937State, and the same bytes.
            cached = 0.0 if gauss is None else gauss
            return PACKED.pack(*words_and_position, gauss is not None, cached)
        except struct.error as error:
            raise ValueError(f"not a state of Python's random: {error}") from error

    def unpack(self, packed: bytes) -> tuple[Any, ...]:
        state = MT19937State.from_bytes(packed)
        # Faster than state.to_python(), and the same.
        return 3, PACKED.unpack(packed)[: WORDS + 1], state.gauss

    def glance(self, state: tuple[Any, ...]) -> tuple[object, ...]:
        """Return what differs wherever two states differ, but for one case in 2**96."""
        # The first word is the same after every seed.
        return state[1][1:4], state[1][-1], state[2]

    def seed(self, value: int) -> None:
        self._generator.seed(value)
