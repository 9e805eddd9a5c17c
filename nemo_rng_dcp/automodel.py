"""NeMo Automodel's names and formats for the global streams of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_rng_dcp import snapshot
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import global_generators
from nemo_rng_dcp.generators.mt19937 import MT19937State
from nemo_rng_dcp.generators.torch_random import current_accelerator, to_bytes


@dataclass
class RNGState:
    """The global streams of one process, in each library's own format (NeMo Automodel's names).

    Attributes:
        random_rng_state: As ``random.getstate()`` gives it.
        np_rng_state: As ``numpy.random.get_state()`` gives it.
        torch_rng_state: As ``torch.get_rng_state()`` gives it: uint8, shape ``(5056,)``.
        cuda_rng_state: The accelerator's states, uint8: the current device's alone, or one for
            each visible device as ``torch.cuda.get_rng_state_all()`` gives them; empty without
            an accelerator.
    """

    random_rng_state: tuple[Any, ...]
    np_rng_state: tuple[Any, ...]
    torch_rng_state: torch.Tensor
    cuda_rng_state: list[torch.Tensor]


def _get_rng_state() -> RNGState:
    """Return the global streams of this process; moves none and does not communicate.

    Returns:
        The state; its ``cuda_rng_state`` holds the current accelerator device's alone.

    Raises:
        RNGStateError: NumPy's global generator does not run MT19937.
    """
    states = snapshot.take(global_generators())
    return RNGState(
        random_rng_state=states.pop("python"),
        np_rng_state=MT19937State.from_numpy(states.pop("numpy")).to_numpy(),
        torch_rng_state=states.pop("torch"),
        cuda_rng_state=list(states.values()),
    )


def _restore_rng_state(state: RNGState) -> None:
    """Put the global streams of this process into a state; does not communicate.

    Args:
        state: What :func:`_get_rng_state` gave, or an ``RNGState`` of NeMo Automodel.

    Raises:
        RNGStateError: A field is missing or malformed, or the state and this process do not have
            the same accelerator streams. No stream has moved.
    """
    generators = global_generators()
    snapshot.restore(generators, snapshot.unpack(generators, packed_states(state)))


def packed_states(state: RNGState) -> dict[str, bytes]:
    """Return the states in an ``RNGState`` as the global generators pack them, by name.

    Moves no stream.

    Raises:
        RNGStateError: A field is missing or malformed, or there is no state for the accelerator.
    """
    device = current_accelerator()
    fields: list[tuple[str, str, Callable[[Any], bytes]]] = [
        ("python", "random_rng_state", lambda field: MT19937State.from_python(field).to_bytes()),
        ("numpy", "np_rng_state", lambda field: MT19937State.from_numpy(field).to_bytes()),
        ("torch", "torch_rng_state", to_bytes),
        ("cuda" if device is None else device.type, "cuda_rng_state", _own_device_state),
    ]
    states = {}
    for name, field, convert in fields:
        value = getattr(state, field, None)
        if value is None:
            raise RNGStateError(f"{name}: the RNGState has no {field}")
        if field == "cuda_rng_state" and device is None and isinstance(value, list) and not value:
            continue
        try:
            states[name] = convert(value)
        except (TypeError, ValueError) as error:
            raise RNGStateError(f"{name}: the RNGState's {field} is malformed: {error}") from error
    return states


def _own_device_state(states: Sequence[torch.Tensor]) -> bytes:
    """Return the current device's state out of one, or out of one for each visible device."""
    device = current_accelerator()
    if device is None:
        raise ValueError(f"{len(states)} accelerator states, but no accelerator here")
    if len(states) == 1:
        return to_bytes(states[0])
    if device.index is None or len(states) != torch.accelerator.device_count():
        raise ValueError(
            f"{len(states)} accelerator states, expected 1 or one for each visible device"
        )
    return to_bytes(states[device.index])
