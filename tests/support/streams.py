"""What tests draw from the global streams, how they see that none has moved, and what was said."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from nemo_rng_dcp import RNGStateWarning
from nemo_rng_dcp.generators import GeneratorSet, device_in_use
from nemo_rng_dcp.generators.numpy_random import SeedSequenceAdapter

needs_seed_sequences = pytest.mark.skipif(
    not SeedSequenceAdapter.fits(np.random.default_rng(0)),
    reason="NumPy before 2 cannot put back what a Generator spawns from, so it is not stored",
)


def draw(count: int = 1) -> list[float]:
    """Draw from every global stream, normals first, so that cached gaussians matter."""
    numbers: list[float] = []
    for _ in range(count):
        numbers += [random.gauss(0, 1), float(np.random.standard_normal()), torch.randn(1).item()]
        numbers += [random.random(), float(np.random.random()), torch.rand(1).item()]
    return numbers


def states() -> dict[str, bytes]:
    generators = GeneratorSet(device_in_use())
    return generators.pack(generators.take())


@contextmanager
def unmoved() -> Iterator[None]:
    before = states()
    yield
    after = states()
    moved = [name for name in before if before[name] != after[name]]
    assert not moved, f"streams moved: {moved}"


def warned(function: Callable[[], object]) -> list[str]:
    """The library's warnings, in their order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if w.category is RNGStateWarning]
