"""Streams of the command's own, by what a record names, and how far apart two states are.

No global stream moves.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nemo_rng_dcp.cli.terminal import plural
from nemo_rng_dcp.generators import GeneratorAdapter
from nemo_rng_dcp.generators import numpy_random as of_numpy
from nemo_rng_dcp.generators.mt19937 import WORDS, MT19937State
from nemo_rng_dcp.generators.python_random import PythonAdapter
from nemo_rng_dcp.generators.torch_random import TorchAdapter
from nemo_rng_dcp.record import Record, Stream, fingerprint

FAR = "another stream, or far off"
_BLOCKS = 2
"""How many regenerations of MT19937 are looked through."""

_BITS = np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64
_ADAPTERS: list[GeneratorAdapter] = [
    PythonAdapter(random.Random()),
    TorchAdapter(torch.Generator()),
    of_numpy.NumPyAdapter(np.random.RandomState()),
    of_numpy.SeedSequenceAdapter(np.random.default_rng()),
    *(of_numpy.NumPyGeneratorAdapter(np.random.Generator(bits())) for bits in _BITS),
]
_TRIALS = {adapter.kind: adapter for adapter in _ADAPTERS}
"""A generator of each kind that every machine has."""
_CHECKS = {**_TRIALS, "python": _TRIALS["numpy"]}
"""What checks a state: Python's is packed as NumPy's, and to unpack it takes longer."""
_DRAWN, _LEFT = (4 * WORDS, struct.pack("=I", WORDS)), (8, struct.pack("=I", 1))
_AFTER_SEED = {"python": _DRAWN, "numpy": _DRAWN, "torch.cpu": _LEFT}
"""What stands after a seed, and where, of the words of a block that are drawn, or left to draw."""
_MT19937: dict[str, Callable[[Any], MT19937State]] = {
    "python": MT19937State.from_python,
    "numpy": MT19937State.from_bytes,
    "numpy.MT19937": MT19937State.from_numpy,
    "torch.cpu": MT19937State.from_torch,
}
"""The kinds that run MT19937, and what reads their states."""


def packed_after_seed(kind: str, seed: int) -> bytes | None:
    """Return the packed state of a generator that was just seeded, where it can be made here."""
    generator = _TRIALS.get(kind)
    if generator is None:
        return None
    generator.seed(seed)
    return generator.pack(generator.get())


def is_at_seed(stream: Stream, seed: int) -> bool:
    """Return whether a stream is where a seed puts it."""
    state, (place, number) = stream.state, _AFTER_SEED.get(stream.kind, (0, b""))
    # To seed takes longer than all else.
    return state.startswith(number, place) and state == packed_after_seed(stream.kind, seed)


def refusals(record: Record) -> dict[str, str]:
    """Return why a generator of a record's kind would not take its state, by name."""
    reasons = {}
    for name, stream in record.streams.items():
        try:
            if stream.kind in _CHECKS:
                _CHECKS[stream.kind].unpack(stream.state)
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def fingerprints(record: Record) -> dict[str, str]:
    """Return what ``StatefulRNG.fingerprint()`` says of a record's streams."""
    return {name: fingerprint(stream.state) for name, stream in record.streams.items()}


def distance(a: Stream, b: Stream) -> str:
    """Return what ``b`` is, such as "2 words ahead" of ``a``; :data:`FAR` where it is not near.

    It is near if both run MT19937 and come from one stream, at most two blocks of 624 words apart.
    """
    if a.kind != b.kind or a.kind not in _MT19937:
        return FAR
    read, generator = _MT19937[a.kind], _TRIALS[a.kind]
    try:
        first, second = (read(generator.unpack(stream.state)) for stream in (a, b))
    except ValueError:
        return FAR
    ahead, behind = _words_between(first, second), _words_between(second, first)
    if ahead is not None:
        return f"{plural(ahead, 'word')} ahead"
    return FAR if behind is None else f"{plural(behind, 'word')} behind"


def _words_between(a: MT19937State, b: MT19937State) -> int | None:
    """Return how many words were drawn between ``a`` and the later ``b``."""
    # Blocks are compared by what follows: 31 bits of a block's first word play no part in that.
    ahead, wanted = _next_block(a.words), _next_block(b.words)
    for blocks in range(_BLOCKS + 1):
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
