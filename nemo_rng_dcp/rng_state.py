"""``RNGState``: the global streams of one process, in NeMo Automodel's formats."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.generators import GeneratorSet, own_device
from nemo_rng_dcp.generators.mt19937 import MT19937State
from nemo_rng_dcp.generators.torch_random import to_bytes

_NUMPY_KEYS = (
    "np_bit_generator",
    "np_keys",
    "np_position",
    "np_has_gauss",
    "np_cached_gaussian",
)
"""NeMo Automodel's present names for what ``numpy.random.get_state()`` gives, in its order."""
_KEYS = ("random_rng_state", *_NUMPY_KEYS, "torch_rng_state", "cuda_rng_state")


@dataclass(eq=False)
class RNGState(Mapping[str, Any]):
    """The global streams of one process, in each library's own format (NeMo Automodel's names).

    It is NeMo Automodel's older dataclass by its attributes and its present dict by its keys, in
    which NumPy's state is spread over ``np_bit_generator``, ``np_keys`` (uint32, shape ``(624,)``),
    ``np_position``, ``np_has_gauss`` and ``np_cached_gaussian``. A copy of it, or what
    ``torch.save`` writes of it, is a plain dict of that kind, which
    ``torch.load(weights_only=True)`` takes.

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

    def __getitem__(self, key: str) -> Any:
        if key in _NUMPY_KEYS:
            part = self.np_rng_state[_NUMPY_KEYS.index(key)]
            return torch.from_numpy(part.copy()) if key == "np_keys" else part
        if key in _KEYS:
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(_KEYS)

    def __len__(self) -> int:
        return len(_KEYS)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (list(self.items()),)


def _get_rng_state() -> RNGState:
    """Return the global streams of this process; moves none and does not communicate.

    Returns:
        The state, to be read by attribute or by key; its ``cuda_rng_state`` holds the current
        accelerator device's alone.

    Raises:
        RNGStateError: NumPy's global generator does not run MT19937.
    """
    states = GeneratorSet(own_device()).take()
    return RNGState(
        random_rng_state=states.pop("python"),
        np_rng_state=MT19937State.from_bytes(states.pop("numpy")).to_numpy(),
        torch_rng_state=states.pop("torch"),
        cuda_rng_state=list(states.values()),
    )


def _restore_rng_state(state: Mapping[str, Any] | RNGState) -> None:
    """Put the global streams of this process into a state; does not communicate.

    Args:
        state: What :func:`_get_rng_state` gave, or NeMo Automodel's dict or older ``RNGState``.

    Raises:
        RNGStateError: A field is missing or malformed. No stream has moved.
    """
    device = own_device()
    generators = GeneratorSet(device)
    generators.restore(generators.unpack(packed_states(state, device)))


def automodel_states(state: object, device: torch.device | None) -> dict[str, bytes] | None:
    """Return :func:`packed_states` of what has the shape of NeMo Automodel's, else ``None``."""
    if isinstance(state, Mapping):
        is_one = any(key in state for key in _KEYS)
    else:
        is_one = hasattr(state, "random_rng_state") and hasattr(state, "torch_rng_state")
    return packed_states(state, device) if is_one else None


def packed_states(state: Any, device: torch.device | None) -> dict[str, bytes]:
    """Return the states in NeMo Automodel's dict or dataclass as the global generators pack them.

    Moves no stream. Warns (``RNGStateWarning``) if the state has an accelerator's stream and the
    process has no accelerator, or the other way round: that stream is left out.

    Args:
        state: As for :func:`_restore_rng_state`.
        device: The accelerator device whose stream is restored.

    Raises:
        RNGStateError: A field is missing or malformed.
    """
    readers: list[tuple[str, str, Callable[[Any], bytes]]] = [
        ("python", "random_rng_state", lambda value: MT19937State.from_python(value).to_bytes()),
        ("numpy", "np_rng_state", lambda value: MT19937State.from_numpy(value).to_bytes()),
        ("torch", "torch_rng_state", to_bytes),
        (
            "cuda" if device is None else device.type,
            "cuda_rng_state",
            lambda field: _own_device_state(field, device),
        ),
    ]
    states = {}
    for name, field, convert in readers:
        value = _field(state, name, field)
        are_states = field == "cuda_rng_state" and isinstance(value, (list, tuple))
        if are_states and not (value and device):
            if value:
                warn(
                    "the RNGState has an accelerator's stream, which this rank does not have: "
                    "ignored"
                )
            elif device:
                warn(f"the RNGState has no accelerator's stream: that of {device} stays as it is")
            continue
        try:
            states[name] = convert(value)
        except (TypeError, ValueError) as error:
            raise RNGStateError(f"{name}: the RNGState's {field} is malformed: {error}") from error
    return states


def _field(state: Any, name: str, field: str) -> Any:
    """Return a field of the older dataclass, also out of the present dict."""
    if not isinstance(state, Mapping) or isinstance(state, RNGState):
        keys, values = [field], [getattr(state, field, None)]
    else:
        keys = list(_NUMPY_KEYS) if field == "np_rng_state" else [field]
        values = [state.get(key) for key in keys]
    for key, value in zip(keys, values, strict=True):
        if value is None:
            raise RNGStateError(f"{name}: the RNGState has no {key}")
    if len(values) == 1:
        return values[0]
    return tuple(v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for v in values)


def _own_device_state(states: Sequence[torch.Tensor], device: torch.device | None) -> bytes:
    """Return the device's state out of one, or out of one for each visible device."""
    if not isinstance(states, (list, tuple)):
        raise ValueError(f"found {states!r:.80}, expected a list of tensors")
    if len(states) == 1:
        return to_bytes(states[0])
    if device is None or device.index is None or len(states) != torch.accelerator.device_count():
        raise ValueError(
            f"{len(states)} accelerator states, expected 1 or one for each visible device. Keep "
            "the one of this rank's device in the list"
        )
    return to_bytes(states[device.index])
