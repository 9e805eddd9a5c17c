"""The accelerator device of a rank: which one there is, is current, and is the rank's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
    count = torch.accelerator.device_count()
    if accelerator is None or wanted.type != accelerator.type or (wanted.index or 0) >= count:
        has = f"{count} of type {accelerator.type}" if accelerator else "no accelerator"
        raise ValueError(
            f"device is {str(wanted)!r}, but this process has {has}: expected one of its own, or "
            "'cpu' if this rank uses none"
        )
    if wanted.index is None or not hasattr(torch.get_device_module(), "current_device"):
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
    is_initialized = getattr(torch.get_device_module(), "is_initialized", None)
    if is_initialized is not None and not is_initialized():
        return None
    return _current(accelerator)


def default_generator(device: torch.device) -> torch.Generator | None:
    """Return the global generator of an accelerator device, if torch shows it (mps does not)."""
    generators: Sequence[torch.Generator] | None
    generators = getattr(torch.get_device_module(), "default_generators", None)
    return None if device.index is None or not generators else generators[device.index]


def _accelerator() -> torch.device | None:
    """Return the accelerator that this process can use, without an index."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    # torch.manual_seed() asks the same before it touches a device.
    bad_fork = getattr(torch.get_device_module(), "_is_in_bad_fork", bool)()
    return None if bad_fork else torch.device(accelerator.type)


def _current(accelerator: torch.device) -> torch.device:
    module: Any = torch.get_device_module()
    if not hasattr(module, "current_device"):
        return accelerator
    return torch.device(module.current_device())
