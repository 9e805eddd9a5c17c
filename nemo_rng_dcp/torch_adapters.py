"""Adapters for torch's generators: a ``torch.Generator``, and the current accelerator's."""

from __future__ import annotations

from typing import Any

import torch

from nemo_rng_dcp.mt19937 import MT19937State, check_vector
from nemo_rng_dcp.seeding import SEED_LIMIT


class TorchAdapter:
    """A ``torch.Generator`` on any device.

    State: the bytes of ``get_state()`` as int64, zero-padded to a multiple of 8: ``(632,)`` on
    the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def read(self) -> torch.Tensor:
        return bytes_to_int64(self._generator.get_state())

    def check(self, state: torch.Tensor) -> None:
        check_torch_state(state, self._generator.get_state().numel(), self._generator.device)

    def write(self, state: torch.Tensor) -> None:
        length = self._generator.get_state().numel()
        self._generator.set_state(int64_to_bytes(state, length))

    def seed(self, value: int) -> None:
        if value < SEED_LIMIT or self._generator.device.type != "cpu":
            self._generator.manual_seed(value)
        else:
            # The CPU's manual_seed() would only see the lower 32 bits.
            self._generator.set_state(MT19937State.from_seed(value).to_torch())


class AcceleratorAdapter:
    """The global generator of one accelerator device.

    State: the bytes of ``get_rng_state()`` as int64, zero-padded to a multiple of 8: ``(2,)`` on
    CUDA.

    Args:
        device: A device of an accelerator that this process can use, with its index where the
            accelerator has several devices.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        # Modules of accelerators that have a single device (mps) take no device argument.
        self._where = () if device.index is None else (device,)

    def read(self) -> torch.Tensor:
        return bytes_to_int64(self.state_bytes())

    def check(self, state: torch.Tensor) -> None:
        check_torch_state(state, self.state_bytes().numel(), self._device)

    def write(self, state: torch.Tensor) -> None:
        content = int64_to_bytes(state, self.state_bytes().numel())
        self._module.set_rng_state(content, *self._where)

    def seed(self, value: int) -> None:
        # The module's manual_seed() would seed whichever device is current by now.
        seeded = torch.Generator(self._device).manual_seed(value)
        self._module.set_rng_state(seeded.get_state(), *self._where)

    def state_bytes(self) -> torch.Tensor:
        """Return the state in torch's own format, uint8."""
        state: torch.Tensor = self._module.get_rng_state(*self._where)
        return state


def current_accelerator() -> torch.device | None:
    """Return the accelerator device that is current in this process, or ``None``.

    A forked child that cannot use its parent's accelerator (a DataLoader worker) has none.
    """
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module: Any = torch.get_device_module(accelerator)
    # torch.manual_seed() asks the same before it touches a device.
    if getattr(module, "_is_in_bad_fork", bool)():
        return None
    if not hasattr(module, "current_device"):
        return torch.device(accelerator.type)
    return torch.device(accelerator.type, module.current_device())


def bytes_to_int64(state: torch.Tensor) -> torch.Tensor:
    """Return uint8 ``(k,)`` as int64 ``(ceil(k / 8),)``, padded with zero bytes.

    Raises:
        ValueError: Not a uint8 tensor of one dimension.
    """
    if (
        not isinstance(state, torch.Tensor)
        or state.dtype != torch.uint8
        or state.ndim != 1
        or state.is_meta
    ):
        raise ValueError(f"expected a uint8 tensor of one dimension, found {state!r:.80}")
    padding = -state.numel() % 8
    padded = torch.cat([state.cpu(), torch.zeros(padding, dtype=torch.uint8, device="cpu")])
    return padded.view(torch.int64)


def int64_to_bytes(state: torch.Tensor, length: int) -> torch.Tensor:
    """Return the first ``length`` bytes of an int64 tensor as uint8: undoes bytes_to_int64."""
    return state.contiguous().view(torch.uint8)[:length].clone()


def check_torch_state(state: torch.Tensor, length: int, device: torch.device) -> None:
    """Raise ``ValueError`` unless a torch generator on ``device`` takes ``state``.

    Args:
        state: int64, as :func:`bytes_to_int64` made it.
        length: Bytes of the generator's own state.
        device: The generator's device.
    """
    check_vector(state, torch.int64, -(-length // 8))
    content = int64_to_bytes(state, length)
    # The format is torch's own and differs between devices, and so does what is valid in it. Some
    # of what is not valid raises here; the rest, such as a word that is too large, is cut off.
    trial = torch.Generator(device)
    try:
        trial.set_state(content)
    except RuntimeError as error:
        raise ValueError(f"torch refuses the state: {error}") from error
    if not torch.equal(bytes_to_int64(trial.get_state()), state):
        raise ValueError("torch takes the state only in part: some of its numbers are out of range")
