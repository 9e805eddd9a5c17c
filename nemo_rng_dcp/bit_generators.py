"""NumPy's bit generators: the state of each as int64 numbers of one length, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nemo_rng_dcp.mt19937 import WORDS, MT19937State, check_vector, to_words

ALGORITHMS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
"""What NumPy ships. A place in this list, counted from 1, is a code in checkpoints: append only."""

TENSOR_LENGTH = 1 + WORDS + 1
"""Elements of :func:`to_tensor`: the code and the numbers of the largest state, MT19937's."""

_WORD = 2**64


def to_tensor(state: dict[str, Any]) -> torch.Tensor:
    """Return what ``numpy.random.BitGenerator.state`` gives as a tensor.

    Args:
        state: The state of one of :data:`ALGORITHMS`.

    Returns:
        int64, shape ``(626,)``: the algorithm's code, the bits of its numbers, zeros.

    Raises:
        ValueError: The state of another algorithm.
    """
    name = state["bit_generator"]
    if name not in ALGORITHMS:
        raise ValueError(f"the bit generator is {name}, expected one of {', '.join(ALGORITHMS)}")
    numbers = np.zeros(TENSOR_LENGTH, dtype=np.uint64)
    content = _numbers(state)
    numbers[0] = ALGORITHMS.index(name) + 1
    numbers[1 : 1 + len(content)] = content
    return torch.from_numpy(numbers.view(np.int64))


def from_tensor(tensor: torch.Tensor, name: str) -> dict[str, Any]:
    """Return what :func:`to_tensor` was given.

    Args:
        tensor: int64, shape ``(626,)``.
        name: The algorithm that the generator runs, one of :data:`ALGORITHMS`.

    Raises:
        ValueError: Another dtype or shape, another algorithm, or a value out of range.
    """
    check_vector(tensor, torch.int64, TENSOR_LENGTH)
    numbers: npt.NDArray[np.uint64] = tensor.contiguous().numpy().view(np.uint64)
    code = int(tensor[0])
    if not 1 <= code <= len(ALGORITHMS):
        raise ValueError(f"the state has algorithm code {code}, expected 1 to {len(ALGORITHMS)}")
    found = ALGORITHMS[code - 1]
    if found != name:
        raise ValueError(f"the state is one of {found}, but the generator runs {name}")
    state = _state(name, numbers[1:])
    used = 1 + len(_numbers(state))
    if numbers[used:].any():
        raise ValueError(f"the state has more numbers than the {used - 1} of {name}")
    return state


def _numbers(state: dict[str, Any]) -> list[int]:
    """Return the numbers that make up a state, in a fixed order."""
    name, inner = state["bit_generator"], state["state"]
    if name == "MT19937":
        return [*inner["key"].tolist(), int(inner["pos"])]
    if name == "Philox":
        core = [*inner["counter"].tolist(), *inner["key"].tolist()]
        core += [*state["buffer"].tolist(), int(state["buffer_pos"])]
    elif name == "SFC64":
        core = inner["state"].tolist()
    else:
        core = [part for key in ("state", "inc") for part in _halves(int(inner[key]))]
    return [*core, int(state["has_uint32"]), int(state["uinteger"])]


def _state(name: str, numbers: npt.NDArray[np.uint64]) -> dict[str, Any]:
    """Return the state that :func:`_numbers` was given, refusing values that NumPy would take."""
    if name == "MT19937":
        position = int(numbers[WORDS])
        words = to_words(numbers[:WORDS])
        MT19937State(words, position)
        return {"bit_generator": name, "state": {"key": words, "pos": position}}
    state: dict[str, Any] = {"bit_generator": name}
    if name == "Philox":
        state["state"] = {"counter": numbers[:4].copy(), "key": numbers[4:6].copy()}
        state["buffer"], state["buffer_pos"] = numbers[6:10].copy(), int(numbers[10])
        if state["buffer_pos"] > 4:
            raise ValueError(f"the buffer position is {state['buffer_pos']}, expected 0 to 4")
        end = 11
    elif name == "SFC64":
        state["state"], end = {"state": numbers[:4].copy()}, 4
    else:
        low, high, inc_low, inc_high = (int(number) for number in numbers[:4])
        state["state"] = {"state": low + high * _WORD, "inc": inc_low + inc_high * _WORD}
        if inc_low % 2 == 0:
            raise ValueError("the increment is even, expected an odd number")
        end = 4
    has_uint32, uinteger = int(numbers[end]), int(numbers[end + 1])
    if has_uint32 > 1 or uinteger >= 2**32:
        raise ValueError(
            f"the spare half word is {uinteger} with flag {has_uint32}, expected below 2**32 with "
            "flag 0 or 1"
        )
    return {**state, "has_uint32": has_uint32, "uinteger": uinteger}


def _halves(number: int) -> tuple[int, int]:
    return number % _WORD, number // _WORD
