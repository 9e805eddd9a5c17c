"""One small adapter per kind of generator: its state as an int64 tensor, and back."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from nemo_rng_dcp.mt19937 import MT19937State, check_vector
from nemo_rng_dcp.seeding import SEED_LIMIT


class GeneratorAdapter(Protocol):
    """How one generator is stored. None of the methods communicates."""

    def read(self) -> torch.Tensor:
        """Return the state without moving the stream: int64, 1-D, always of the same length.

        Raises:
            ValueError: The generator is in a state that cannot be stored.
        """
        ...

    def check(self, state: torch.Tensor) -> None:
        """Raise ``ValueError`` unless ``state`` is one that :meth:`write` will take.

        The generator is not touched.
        """
        ...

    def write(self, state: torch.Tensor) -> None:
        """Put the generator into a state that was checked."""
        ...

    def seed(self, value: int) -> None:
        """Start a stream that depends on every bit of ``value``, ``0 <= value < 2**64``.

        Below 2**32 it is the stream that the generator's own library starts from that seed.
        """
        ...


class PythonAdapter:
    """Python's ``random``: the module, whose functions are the global generator's, or a Random.

    State: int64 ``(627,)``, see :meth:`MT19937State.to_tensor`.
    """

    def __init__(self, generator: ModuleType | random.Random) -> None:
        self._generator: Any = generator

    def read(self) -> torch.Tensor:
        return MT19937State.from_python(self._generator.getstate()).to_tensor()

    def check(self, state: torch.Tensor) -> None:
        MT19937State.from_tensor(state)

    def write(self, state: torch.Tensor) -> None:
        self._generator.setstate(MT19937State.from_tensor(state).to_python())

    def seed(self, value: int) -> None:
        self._generator.seed(value)


class NumPyAdapter:
    """NumPy's legacy generator: the module ``numpy.random``, whose functions are the global one's.

    State: int64 ``(627,)``, see :meth:`MT19937State.to_tensor`. The global generator may run on
    another algorithm since NumPy 1.24 (``numpy.random.set_bit_generator``); its state would not
    fit the table, so that is refused.
    """

    def __init__(self, generator: ModuleType | np.random.RandomState) -> None:
        self._generator: Any = generator

    def read(self) -> torch.Tensor:
        return MT19937State.from_numpy(self._state()).to_tensor()

    def check(self, state: torch.Tensor) -> None:
        # Not the new state's fault, but it could not be written either.
        self._state()
        MT19937State.from_tensor(state)

    def write(self, state: torch.Tensor) -> None:
        self._generator.set_state(MT19937State.from_tensor(state).to_numpy())

    def seed(self, value: int) -> None:
        if value < SEED_LIMIT:
            self._generator.seed(value)
        else:
            self._generator.set_state(MT19937State.from_seed(value).to_numpy())

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._generator.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise ValueError(
                f"the generator runs {state['bit_generator']}, and only MT19937, NumPy's default, "
                "can be stored. Give the default back at the start of the job: "
                "np.random.set_bit_generator(np.random.MT19937())"
            )
        return state


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
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError(f"expected a uint8 tensor of one dimension, found {state!r:.80}")
    padding = -state.numel() % 8
    padded = torch.cat([state.cpu(), torch.zeros(padding, dtype=torch.uint8)])
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
    if device.type == "cpu":
        MT19937State.from_torch(content)
        return
    try:
        # The format belongs to the device, and so does the knowledge of what is valid in it.
        torch.Generator(device).set_state(content)
    except RuntimeError as error:
        raise ValueError(f"{device.type} refuses the state: {error}") from error
