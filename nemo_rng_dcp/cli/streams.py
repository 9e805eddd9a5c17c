"""Streams of the command's own, by what a record names, and how far apart two states are.

No global stream moves.
"""

from __future__ import annotations

import random
from functools import cache

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

_BIT_GENERATORS = {"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"}
_BLOCKS = 2
"""How many regenerations of MT19937 are looked through."""


@cache
def trial_generator(kind: str) -> GeneratorAdapter | None:
    """Return a generator of a kind; ``None`` for one that this machine may not have."""
    if kind == "python":
        return PythonAdapter(random.Random())
    if kind == "numpy":
        return of_numpy.NumPyAdapter(np.random.RandomState())
    if kind == "torch.cpu":
        return TorchAdapter(torch.Generator())
    if kind == of_numpy.SeedSequenceAdapter.kind:
        return of_numpy.SeedSequenceAdapter(np.random.default_rng())
    library, _, algorithm = kind.partition(".")
    if library == "numpy" and algorithm in _BIT_GENERATORS:
        return of_numpy.NumPyGeneratorAdapter(np.random.Generator(getattr(np.random, algorithm)()))
    return None


def packed_after_seed(kind: str, seed: int) -> bytes | None:
    """Return the packed state of a generator that was just seeded, where it can be made here."""
    generator = trial_generator(kind)
    if generator is None:
        return None
    generator.seed(seed)
    return generator.pack(generator.get())


def refusals(record: Record) -> dict[str, str]:
    """Return why a generator of a record's kind would not take its state, by name."""
    reasons = {}
    for name, stream in record.streams.items():
        generator = trial_generator(stream.kind)
        try:
            if generator is not None:
                generator.unpack(stream.state)
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def fingerprints(record: Record) -> dict[str, str]:
    """Return what ``StatefulRNG.fingerprint()`` says of a record's streams."""
    return {name: fingerprint(stream.state) for name, stream in record.streams.items()}


def distance(a: Stream, b: Stream) -> str | None:
    """Return how far ``b`` is ahead of ``a``, in words; ``None`` where it is not near.

    It is near if both run MT19937 and come from one stream, at most two blocks of 624 words apart.
    """
    if a.kind != b.kind:
        return None
    try:
        first, second = _mt19937(a), _mt19937(b)
    except ValueError:
        return None
    ahead, behind = _words_between(first, second), _words_between(second, first)
    if ahead == behind == 0:
        return "at the same word, with another cached normal"
    if ahead is not None:
        return f"{plural(ahead, 'word')} ahead"
    return None if behind is None else f"{plural(behind, 'word')} behind"


def _mt19937(stream: Stream) -> MT19937State:
    """Return a state of MT19937.

    Raises:
        ValueError: It is malformed, or another algorithm's.
    """
    if stream.kind in ("python", "numpy"):
        return MT19937State.from_bytes(stream.state)
    if stream.kind == "torch.cpu":
        state = torch.frombuffer(bytearray(stream.state), dtype=torch.uint8)
        return MT19937State.from_torch(state)
    generator = trial_generator(stream.kind)
    if stream.kind != "numpy.MT19937" or generator is None:
        raise ValueError(f"{stream.kind} is not MT19937")
    return MT19937State.from_numpy(generator.unpack(stream.state))


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
