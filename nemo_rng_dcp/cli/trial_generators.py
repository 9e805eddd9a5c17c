"""Generators of the command's own, by what a record names; no global stream moves."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch

from nemo_rng_dcp.generators import GeneratorAdapter
from nemo_rng_dcp.generators.numpy_random import NumPyAdapter, NumPyGeneratorAdapter
from nemo_rng_dcp.generators.python_random import PythonAdapter
from nemo_rng_dcp.generators.torch_random import TorchAdapter
from nemo_rng_dcp.record import Record

_BIT_GENERATORS = {"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"}


@cache
def trial_generator(kind: str) -> GeneratorAdapter | None:
    """Return a generator of a kind; ``None`` for one that this machine may not have."""
    if kind == "python":
        return PythonAdapter(random.Random())
    if kind == "numpy":
        return NumPyAdapter(np.random.RandomState())
    if kind == "torch.cpu":
        return TorchAdapter(torch.Generator())
    library, _, algorithm = kind.partition(".")
    if library == "numpy" and algorithm in _BIT_GENERATORS:
        return NumPyGeneratorAdapter(np.random.Generator(getattr(np.random, algorithm)()))
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
