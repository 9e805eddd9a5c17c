"""Which generators a process has: the global ones, and those that were registered."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nemo_rng_dcp.adapters import (
    GeneratorAdapter,
    NumPyAdapter,
    NumPyGeneratorAdapter,
    PythonAdapter,
    read_state,
)
from nemo_rng_dcp.origin import ORIGIN
from nemo_rng_dcp.torch_adapters import AcceleratorAdapter, TorchAdapter, current_accelerator


def global_generators() -> dict[str, GeneratorAdapter]:
    """Return the global generators of this process by table name.

    Returns:
        ``python``, ``numpy`` and ``torch``; with an accelerator also its device type (``cuda``),
        for the device that is current now.
    """
    generators: dict[str, GeneratorAdapter] = {
        "python": PythonAdapter(random),
        "numpy": NumPyAdapter(np.random),
        "torch": TorchAdapter(torch.default_generator),
    }
    device = current_accelerator()
    if device is not None:
        generators[device.type] = AcceleratorAdapter(device)
    return generators


def registered_generators(generators: Mapping[str, Any]) -> dict[str, GeneratorAdapter]:
    """Return adapters for generators that a job keeps beside the global ones.

    Args:
        generators: By table name a ``torch.Generator``, ``numpy.random.Generator``,
            ``numpy.random.RandomState`` or ``random.Random``, or a :class:`GeneratorAdapter` of
            the caller's own.

    Raises:
        ValueError: A name is no identifier or is a table of the library's own; one generator is
            given twice, or is Python's, NumPy's or torch CPU's global one; or its state cannot be
            stored.
        TypeError: ``generators`` is no mapping, or an object is of another kind.
    """
    adapters: dict[str, GeneratorAdapter] = {}
    if not isinstance(generators, Mapping):
        raise TypeError(
            f"generators is a {type(generators).__name__}, expected a mapping from names"
        )
    owners: dict[int, str] = {
        id(random.random.__self__): "python",  # type: ignore[attr-defined]
        id(torch.default_generator): "torch",
        id(np.random.get_bit_generator()): "numpy",  # type: ignore[attr-defined]
    }
    for name, generator in generators.items():
        if not isinstance(name, str) or not name.isidentifier() or is_reserved(name):
            raise ValueError(
                f"{name!r} cannot name a generator: expected an identifier that is no device type "
                f"and none of {ORIGIN}, python, numpy, torch"
            )
        # Two of NumPy's generators over one bit generator are two handles of one stream.
        bit_generator = getattr(generator, "_bit_generator", None)
        source = id(getattr(generator, "bit_generator", bit_generator or generator))
        if source in owners:
            raise ValueError(
                f"{name} is the same generator as {owners[source]}: register each stream once"
            )
        owners[source] = name
        adapters[name] = _adapter(name, generator)
        try:
            read_state(adapters[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return adapters


def _adapter(name: str, generator: Any) -> GeneratorAdapter:
    if isinstance(generator, torch.Generator):
        return TorchAdapter(generator)
    if isinstance(generator, np.random.Generator):
        return NumPyGeneratorAdapter(generator)
    if isinstance(generator, np.random.RandomState):
        return NumPyAdapter(generator)
    # SystemRandom is a Random without a state.
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return PythonAdapter(generator)
    if isinstance(generator, GeneratorAdapter) and not isinstance(generator, type):
        return generator
    raise TypeError(
        f"{name} is a {type(generator).__name__}, expected a torch.Generator, a "
        "numpy.random.Generator or RandomState, a random.Random, or an object with the methods "
        "read, check, write and seed"
    )


def is_reserved(name: str) -> bool:
    """Return whether a table name is ``origin`` or a global generator's, on any machine."""
    if name in (ORIGIN, "python", "numpy", "torch"):
        return True
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True  # the table of an accelerator, on this machine or another
