"""Notices a registered generator that its owner gave up for another one."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from nemo_rng_dcp.errors import warn
from nemo_rng_dcp.generators.registry import registered_generators

_FRESH: dict[type, Callable[[], Any]] = {
    torch.Generator: torch.Generator,
    np.random.Generator: np.random.default_rng,
    np.random.RandomState: np.random.RandomState,
    random.Random: random.Random,
}


class Held:
    """Counts who holds the generators that a job registered as objects of the four libraries.

    That nobody else holds one is certain, and then nobody can draw from it. That one has not moved
    says less: a shuffle's generator moves once an epoch, and one for plots more rarely.

    Args:
        generators: By name, as they were registered.
        shared: More of them.
    """

    def __init__(self, generators: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        self.generators = {
            name: generator
            for given in (generators, shared)
            for name, generator in given.items()
            if isinstance(generator, tuple(_FRESH))
        }
        self._at_first = {name: self._references(name) for name in self.generators}
        self._times = dict.fromkeys(self.generators, 0)

    def warn_of_dropped(self) -> None:
        """Warn of what the owners gave up, of each name once; for ``state_dict()``.

        It is said at the second time: a job may save once more when its loop is over.
        """
        for name, first in self._at_first.items():
            kind = next(kind for kind in _FRESH if isinstance(self.generators[name], kind))
            alone = _references_of_the_set_alone(kind)
            # Then too, the mapping held it. If nothing else did, it may stand for a generator that
            # only other ranks have.
            was_held = first[0] > alone[0] + 1 or first[1] > alone[1]
            now = self._references(name)
            if was_held and now[0] <= alone[0] and now[1] <= alone[1]:
                self._times[name] += 1
                if self._times[name] == 2:
                    warn(
                        f"{name}: nothing but this StatefulRNG holds the registered generator any "
                        "more, so nothing draws from it. If its owner has another one now "
                        "(copy.deepcopy, unpickling, a reset), that one is not stored: register a "
                        "function that returns the one in use, such as "
                        f"{name}=lambda: sampler.generator"
                    )

    def _references(self, name: str) -> tuple[int, int]:
        generator = self.generators[name]
        # Others may draw from NumPy's bit generator through another handle.
        bits = getattr(generator, "_bit_generator", None)
        return sys.getrefcount(generator), 0 if bits is None else sys.getrefcount(bits)


@cache
def _references_of_the_set_alone(kind: type) -> tuple[int, int]:
    """Count them for a generator of a kind that nobody but the library holds."""
    trial = {"trial": _FRESH[kind]()}
    held, adapters = Held(trial, {}), registered_generators(trial, {}, None)
    trial.clear()
    references = held._references("trial")
    del adapters  # it counted until now
    return references
