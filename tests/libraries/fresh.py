"""A process of its own for what imports a library: nothing was imported or drawn in it before."""

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.support.jobs import job
from tests.support.streams import states

SEEDS: dict[str, Callable[[int], object]] = {
    "python": random.seed,
    "numpy": np.random.seed,
    "torch": torch.manual_seed,
}
"""How each of our streams is started."""


def fresh(function: Callable[..., Any], *args: object, ranks: int = 1, backend: str = "") -> Any:
    """Run ``function(*args)`` in a new process, or in one for each of two ranks.

    Args:
        backend: What Keras runs on.

    Returns:
        What it returned; of several ranks, a list.
    """
    results = job(ranks, _run, backend, function, args, group=ranks > 1)
    return results if ranks > 1 else results[0]


def _run(backend: str, function: Callable[..., Any], args: tuple[object, ...]) -> Any:
    os.environ.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3")
    return function(*args)


def moved(function: Callable[[], object]) -> set[str]:
    """Return which of our streams a call moves."""
    before = states()
    function()
    after = states()
    return {name for name in before if before[name] != after[name]}
