"""torch's generators: a ``torch.Generator``, and the global one of an accelerator device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nemo_rng_dcp.generators.mt19937 import SEED_LIMIT, MT19937State, check_length


class TorchAdapter:
    """A ``torch.Generator`` on any device.

    Packed: the bytes of ``get_state()``, 5,056 on the CPU, 16 on CUDA, in torch's own format.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._device = generator.device
        self.kind = f"torch.{generator.device.type}"

    def get(self) -> torch.Tensor:
        return self._generator.get_state()

    def set(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def pack(self, state: torch.Tensor) -> bytes:
        return to_bytes(state)

    def unpack(self, packed: bytes) -> torch.Tensor:
        return _accepted(packed, self.get().numel(), self._device)

    def seed(self, value: int) -> None:
        if value < SEED_LIMIT or self._device.type != "cpu":
            self._generator.manual_seed(value)
        else:
            # The CPU's manual_seed() would only see the lower 32 bits.
            self._generator.set_state(MT19937State.from_seed(value).to_torch(initial_seed=value))


class AcceleratorAdapter:
    """The global generator of one accelerator device.

    Packed: the bytes of ``get_rng_state()``, 16 on CUDA.

    Args:
        device: A device of an accelerator that this process can use, with its index where the
            accelerator has several devices.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        # Modules of accelerators that have a single device (mps) take no device argument.
        self._where = () if device.index is None else (device,)
        self.kind = f"torch.{device.type}"

    def get(self) -> torch.Tensor:
        state: torch.Tensor = self._module.get_rng_state(*self._where)
        return state

    def set(self, state: torch.Tensor) -> None:
        self._module.set_rng_state(state, *self._where)

    def pack(self, state: torch.Tensor) -> bytes:
        return to_bytes(state)

    def unpack(self, packed: bytes) -> torch.Tensor:
        return _accepted(packed, self.get().numel(), self._device)

    def seed(self, value: int) -> None:
        # The module's manual_seed() would seed whichever device is current by now.
        self.set(torch.Generator(self._device).manual_seed(value).get_state())


def own_device(device: torch.device | str | int | None = None) -> torch.device | None:
    """Return the accelerator device that a rank calls its own, with its index, or ``None``.

    Initialises the accelerator if it has to ask which device is current.

    Args:
        device: A device of this process's accelerator, or its index. ``None``: the one that is
            current in this thread; a forked child that cannot use its parent's accelerator (a
            DataLoader worker) has none. ``"cpu"``: none.

    Raises:
        ValueError: This process's accelerator has no such device.
    """
    accelerator = _accelerator()
    if device is None:
        return None if accelerator is None else _current(accelerator)
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, which names no device: {error}") from error
    if wanted.type == "cpu":
        return None
    count = 0 if accelerator is None else torch.accelerator.device_count()
    if accelerator is None or wanted.type != accelerator.type or (wanted.index or 0) >= count:
        has = f"{count} of type {accelerator.type}" if accelerator else "no accelerator"
        raise ValueError(
            f"device is {str(wanted)!r}, but this process has {has}: expected one of its own, or "
            "'cpu' if this rank uses none"
        )
    if wanted.index is None or not hasattr(torch.get_device_module(wanted), "current_device"):
        return _current(accelerator)
    return wanted


def device_in_use() -> torch.device | None:
    """Return the accelerator device that is current in this thread; initialises nothing.

    ``None`` without an accelerator, and while this process has not used it.
    """
    accelerator = _accelerator()
    if accelerator is None:
        return None
    # Without the question (mps) the accelerator is in use from the start.
    is_initialized = getattr(torch.get_device_module(accelerator), "is_initialized", None)
    if is_initialized is not None and not is_initialized():
        return None
    return _current(accelerator)


def default_generator(device: torch.device) -> torch.Generator | None:
    """Return the global generator of an accelerator device, if torch shows it (mps does not)."""
    generators: Sequence[torch.Generator]
    generators = getattr(torch.get_device_module(device), "default_generators", ())
    return None if device.index is None or not generators else generators[device.index]


def initial_seed(device: torch.device) -> int:
    """Return what the global generator of an accelerator device was last seeded with."""
    generator = torch.Generator(device)
    # The module's own initial_seed() knows the current device alone.
    generator.set_state(AcceleratorAdapter(device).get())
    return generator.initial_seed()


def _accelerator() -> torch.device | None:
    """Return the accelerator that this process can use, without an index."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    # torch.manual_seed() asks the same before it touches a device.
    bad_fork = getattr(torch.get_device_module(accelerator), "_is_in_bad_fork", bool)()
    return None if bad_fork else torch.device(accelerator.type)


def _current(accelerator: torch.device) -> torch.device:
    module: Any = torch.get_device_module(accelerator)
    if not hasattr(module, "current_device"):
        return accelerator
    return torch.device(accelerator.type, module.current_device())


def to_bytes(state: torch.Tensor) -> bytes:
    """Return the bytes of a uint8 tensor of one dimension.

    Raises:
        ValueError: It is something else.
    """
    if (
        not isinstance(state, torch.Tensor)
        or state.dtype != torch.uint8
        or state.ndim != 1
        or state.is_meta
    ):
        raise ValueError(f"expected a uint8 tensor of one dimension, found {state!r:.80}")
    return state.cpu().numpy().tobytes()


def _accepted(packed: bytes, length: int, device: torch.device) -> torch.Tensor:
    """Return a packed state as uint8, after making sure that a generator on ``device`` takes it."""
    check_length(packed, length)
    state = torch.from_numpy(np.frombuffer(bytearray(packed), dtype=np.uint8))
    # The format differs between devices, and so does what is valid in it. Some of what is not valid
    # raises here; the rest, such as a word that is too large, is cut off.
    trial = torch.Generator(device)
    try:
        trial.set_state(state)
    except RuntimeError as error:
        raise ValueError(f"torch refuses the state: {error}") from error
    if not torch.equal(trial.get_state(), state):
        raise ValueError("torch takes the state only in part: some of its numbers are out of range")
    return state
