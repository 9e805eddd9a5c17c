"""Which generators a process has: the global ones, and those that a job registers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from nemo_rng_dcp.generators.adapter import GeneratorAdapter
from nemo_rng_dcp.generators.device import default_generator
from nemo_rng_dcp.generators.numpy_random import (
    NumPyAdapter,
    NumPyGeneratorAdapter,
    SeedSequenceAdapter,
)
from nemo_rng_dcp.generators.python_random import PythonAdapter
from nemo_rng_dcp.generators.torch_random import AcceleratorAdapter, TorchAdapter


def generators_of_process(device: torch.device | None) -> dict[str, GeneratorAdapter]:
    """Return the global generators of this process by name.

    Args:
        device: The accelerator device whose generator is among them; ``None``: no device's.

    Returns:
        ``python``, ``numpy`` and ``torch``; with a device also its type (``cuda``).
    """
    generators: dict[str, GeneratorAdapter] = {
        "python": PythonAdapter(random),
        "numpy": NumPyAdapter(np.random.mtrand._rand),
        "torch": TorchAdapter(torch.default_generator),
    }
    if device is not None:
        generators[device.type] = AcceleratorAdapter(device)
    return generators


def registered_generators(
    generators: Mapping[str, Any], shared: Mapping[str, Any], device: torch.device | None
) -> dict[str, GeneratorAdapter]:
    """Return adapters for generators that a job keeps beside the global ones.

    What a ``numpy.random.Generator`` spawns from is stored beside it, as ``name.seed_seq``.

    Args:
        generators: By name a ``torch.Generator``, ``numpy.random.Generator``,
            ``numpy.random.RandomState`` or ``random.Random``, a :class:`GeneratorAdapter` of the
            caller's own, or a function that returns one of them: the one that is in use. It is
            called whenever the generator is read or written.
        shared: More of them.
        device: The accelerator device whose global generator is this rank's.

    Raises:
        ValueError: A name is no identifier, is one of the library's own or is given twice; one
            generator is given twice, or is Python's, NumPy's, torch CPU's or the device's global
            one; its state cannot be stored; or a function returns another one at each call.
        TypeError: An argument is no mapping, an object is of another kind, or an adapter's ``kind``
            is no string.
    """
    adapters: dict[str, GeneratorAdapter] = {}
    owners: dict[int, str] = {
        id(random.random.__self__): "python",  # type: ignore[attr-defined]
        id(torch.default_generator): "torch",
        id(np.random.get_bit_generator()): "numpy",  # type: ignore[attr-defined]
    }
    of_device = None if device is None else default_generator(device)
    if of_device is not None:
        owners[id(of_device)] = of_device.device.type
    fixed = dict(owners)  # what a function returns may change
    for argument, given in (("generators", generators), ("shared_generators", shared)):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{argument} is a {type(given).__name__}, expected a mapping from names"
            )
        for name, generator in given.items():
            if not isinstance(name, str) or not name.isidentifier() or is_reserved(name):
                raise ValueError(
                    f"{name!r} cannot name a generator: expected an identifier that is no device "
                    "type and none of python, numpy, torch"
                )
            if name in adapters:
                raise ValueError(f"{name} is in generators and in shared_generators: choose one")
            find = _finder(generator)
            first = find()
            source = source_of(first)
            if source in owners:
                raise ValueError(
                    f"{name} is the same generator as {owners[source]}: register each stream once"
                )
            if source != source_of(find()):
                raise ValueError(
                    f"{name}: the function that was registered returned another generator at its "
                    "second call: return the one that is in use"
                )
            owners[source] = name
            parts = _parts(name, first)
            if find is generator:
                parts = {
                    part: _Current(name, part, find, adapter.kind, fixed)
                    for part, adapter in parts.items()
                }
            else:
                fixed[source] = name
            for part, adapter in parts.items():
                _check_that_it_can_be_stored(part, adapter)
            adapters.update(parts)
    return adapters


def can_be_registered(value: Any) -> bool:
    """Return whether a value is a generator of torch, NumPy or Python, and none of the process's.

    What only looks like one is none: a subclass without a state, or one in a state of its own.
    """
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    if not isinstance(value, kinds):
        return False
    try:
        registered_generators({"trial": value}, {}, None)
    except (TypeError, ValueError):
        return False
    return True


def source_of(generator: Any) -> int:
    """Return what two handles of one stream have in common, while one of them lives."""
    # As two of NumPy's generators over one bit generator are.
    return id(getattr(generator, "_bit_generator", generator))


def is_reserved(name: str) -> bool:
    """Return whether a name is a global generator's, on this machine or another."""
    if name in ("python", "numpy", "torch"):
        return True
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


class _Current:
    """The generator that a function of the job returns now, checked at each use."""

    def __init__(
        self,
        name: str,
        part: str,
        find: Callable[[], Any],
        kind: str,
        owners: Mapping[int, str],
    ) -> None:
        self._name, self._part, self._find, self.kind = name, part, find, kind
        self._owners = owners

    def get(self) -> Any:
        return self._now().get()

    def set(self, state: Any) -> None:
        self._now().set(state)

    def pack(self, state: Any) -> bytes:
        return self._now().pack(state)

    def unpack(self, packed: bytes) -> Any:
        return self._now().unpack(packed)

    def seed(self, value: int) -> None:
        self._now().seed(value)

    def _now(self) -> GeneratorAdapter:
        generator = self._find()
        owner = self._owners.get(source_of(generator))
        if owner is not None:
            raise ValueError(f"the function returned the generator of {owner}")
        try:
            adapter = _parts(self._name, generator).get(self._part)
        except TypeError as error:
            raise ValueError(f"the function returned another object: {error}") from error
        if adapter is None or adapter.kind != self.kind:
            found = "another one" if adapter is None else f"a {adapter.kind} generator"
            raise ValueError(f"the function returned {found}, after a {self.kind} one before")
        return adapter


def _finder(generator: Any) -> Callable[[], Any]:
    """Return the function that was registered, or one that returns what was."""
    if callable(generator) and not isinstance(generator, (type, GeneratorAdapter)):
        return generator  # type: ignore[no-any-return]
    return lambda: generator


def _parts(name: str, generator: Any) -> dict[str, GeneratorAdapter]:
    """Return what is stored of a registered generator, by the names in a record."""
    parts: dict[str, GeneratorAdapter] = {name: _adapter(name, generator)}
    if isinstance(generator, np.random.Generator) and SeedSequenceAdapter.fits(generator):
        parts[f"{name}.seed_seq"] = SeedSequenceAdapter(generator)
    return parts


def _adapter(name: str, generator: Any) -> GeneratorAdapter:
    if isinstance(generator, torch.Generator):
        return TorchAdapter(generator)
    if isinstance(generator, np.random.Generator):
        return NumPyGeneratorAdapter(generator)
    if isinstance(generator, np.random.RandomState):
        return NumPyAdapter(generator)
    # SystemRandom is a Random without a state.
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        own, base = type(generator), random.Random
        if own.random is not base.random or own.getrandbits is not base.getrandbits:
            raise TypeError(
                f"{name} is a {own.__name__}, a random.Random with random() or getrandbits() of "
                "its own, whose state getstate() may not tell: register an object with kind and "
                "the methods get, set, pack, unpack and seed instead (GeneratorAdapter)"
            )
        return PythonAdapter(generator)
    if isinstance(generator, GeneratorAdapter) and not isinstance(generator, type):
        if not isinstance(generator.kind, str):
            raise TypeError(
                f"{name}: the adapter's kind is {generator.kind!r}, expected a string, such as "
                "'counter': a checkpoint stores it"
            )
        return generator
    raise TypeError(
        f"{name} is a {type(generator).__name__}, expected a torch.Generator, a "
        "numpy.random.Generator or RandomState, a random.Random, an object with kind and the "
        "methods get, set, pack, unpack and seed (GeneratorAdapter), or a function that returns "
        "one of them"
    )


def _check_that_it_can_be_stored(name: str, adapter: GeneratorAdapter) -> None:
    # Found out now, and not at the first save or, worse, at the first load.
    try:
        packed = adapter.pack(adapter.get())
        if not isinstance(packed, bytes) or not packed:
            raise ValueError(f"pack() gave {packed!r:.80}, expected at least one byte")
        adapter.unpack(packed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
