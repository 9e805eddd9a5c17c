"""How many draws lie between two states of one stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from nemo_rng_dcp.cli.trial_generators import trial_generator
from nemo_rng_dcp.generators.mt19937 import WORDS, MT19937State
from nemo_rng_dcp.record import Stream

BLOCKS = 2
"""How many regenerations of MT19937 are looked through."""


def distance(a: Stream, b: Stream) -> str | None:
    """Return how far ``b`` is ahead of ``a``, in words; ``None`` where it is not near.

    It is near if both run MT19937 and come from one stream, at most two blocks of 624 words apart.
    """
    read = _READERS.get(a.kind)
    if read is None or a.kind != b.kind:
        return None
    try:
        first, second = read(a.state), read(b.state)
    except ValueError:
        return None
    words = _words_ahead(first, second)
    if words is None and (back := _words_ahead(second, first)) is not None:
        words = -back
    if words is None:
        return None
    if words == 0:
        return "at the same word, with another cached normal"
    count = abs(words)
    return f"{count} word{'s' * (count != 1)} {'ahead' if words > 0 else 'behind'}"


def _words_ahead(a: MT19937State, b: MT19937State) -> int | None:
    """Return how many words were drawn between ``a`` and the later ``b``."""
    # Blocks are compared by what follows: 31 bits of a block's first word play no part in that.
    ahead, wanted = _next_block(a.words), _next_block(b.words)
    for blocks in range(BLOCKS + 1):
        words = blocks * WORDS + b.position - a.position
        if words >= 0 and np.array_equal(ahead, wanted):
            return words
        ahead = _next_block(ahead)
    return None


def _next_block(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    generator = np.random.RandomState()
    generator.set_state(MT19937State(words, WORDS).to_numpy())
    generator.randint(2**32, dtype=np.uint32)
    return MT19937State.from_numpy(generator.get_state()).words


def _of_generator(state: bytes) -> MT19937State:
    generator = trial_generator("numpy.MT19937")
    assert generator is not None
    return MT19937State.from_numpy(generator.unpack(state))


def _of_torch(state: bytes) -> MT19937State:
    return MT19937State.from_torch(torch.frombuffer(bytearray(state), dtype=torch.uint8))


_READERS: dict[str, Callable[[bytes], MT19937State]] = {
    "python": MT19937State.from_bytes,
    "numpy": MT19937State.from_bytes,
    "numpy.MT19937": _of_generator,
    "torch.cpu": _of_torch,
}
