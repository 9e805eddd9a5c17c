"""torch's generators: a ``torch.Generator``, and the global one of an accelerator device."""

from __future__ import annotations

from typing import Any

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
        self._module: Any = torch.get_device_module()
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


def initial_seed(device: torch.device, state: torch.Tensor) -> int:
    """Return what a generator on a device was last seeded with, by its state."""
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator.initial_seed()


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
    state = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    # The format differs between devices, and so does what is valid in it. Some of what is not valid
    # raises here; the rest, such as a word that is too large, is cut off.
    trial = torch.Generator(device)
    try:
        trial.set_state(state)
    except RuntimeError as error:
        raise ValueError(f"torch refuses the state: {error}") from error
    if not torch.equal(trial.get_state().cpu(), state):
        raise ValueError("torch takes the state only in part: some of its numbers are out of range")
    return state
