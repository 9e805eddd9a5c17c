"""NumPy's legacy generator is read and written in memory exactly as by NumPy's own functions."""

import itertools
import struct
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemo_rng_dcp.generators import legacy_memory
from nemo_rng_dcp.generators.legacy_memory import LegacyMemory
from nemo_rng_dcp.generators.mt19937 import MT19937State
from nemo_rng_dcp.generators.numpy_random import NumPyAdapter

GAUSSES = None, -0.0, 1.5, float("nan"), 5e-324


@pytest.fixture(params=["in memory", "by NumPy's functions"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "in memory":
        monkeypatch.setattr(legacy_memory, "_PLACE", None)
    return str(request.param)


def put(generator: np.random.RandomState, position: int, gauss: float | None) -> Any:
    words = np.random.RandomState(position).randint(1, 2**32, 624, dtype=np.uint32)
    generator.set_state(MT19937State(words, position, gauss).to_numpy())
    return generator.get_state()


@pytest.mark.parametrize("of_process", [True, False])
def test_every_state_is_the_one_that_numpy_gives_and_takes(way: str, of_process: bool) -> None:
    generator = np.random.mtrand._rand if of_process else np.random.RandomState()
    adapter, before = NumPyAdapter(generator), generator.get_state()
    place = _, memory = adapter._memory()
    assert adapter._memory() is place, "looked for once"
    assert (memory is not None) == (way == "in memory"), "this NumPy's layout is known"
    try:
        for position, gauss in itertools.product((0, 1, 623, 624), GAUSSES):
            expected = put(generator, position, gauss)
            state = adapter.get()
            assert state == MT19937State.from_numpy(expected).to_bytes()
            put(generator, 5, 2.5 if gauss is None else None)
            adapter.set(adapter.unpack(adapter.pack(state)))
            found: Any = generator.get_state()
            assert found[1].tolist() == expected[1].tolist()
            assert struct.pack("=iid", *found[2:]) == struct.pack("=iid", *expected[2:])
    finally:
        generator.set_state(before)


def test_a_state_that_was_given_does_not_move(way: str) -> None:
    generator = np.random.RandomState(5)
    adapter = NumPyAdapter(generator)
    state = adapter.get()
    expected = generator.standard_normal(701).tolist()
    adapter.set(state)
    assert generator.standard_normal(701).tolist() == expected
    adapter.set(state)
    assert generator.standard_normal(701).tolist() == expected


def test_the_generator_of_a_subclass_is_one_too(way: str) -> None:
    class Own(np.random.RandomState):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.more = list(range(5))

    generator = Own(1)
    expected = put(generator, 7, 0.5)
    adapter = NumPyAdapter(generator)
    state = adapter.get()
    generator.standard_normal()
    adapter.set(state)
    assert MT19937State.from_numpy(generator.get_state()).to_bytes() == state
    assert (MT19937State.from_numpy(expected).to_bytes(), generator.more) == (state, [*range(5)])


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (legacy_memory, "_BLOCK", struct.Struct(">625I")),
        (legacy_memory, "_NORMAL", struct.Struct("@i12xd")),
        (sys, "implementation", SimpleNamespace(name="pypy")),
    ],
)
def test_memory_with_another_layout_is_left_alone(
    owner: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert legacy_memory._place_of_the_normal() == legacy_memory._PLACE
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, other)
        assert legacy_memory._place_of_the_normal() is None


def test_another_algorithm_is_left_alone() -> None:
    class Own(np.random.MT19937):
        pass

    for bits in (np.random.PCG64(1), Own(1)):
        assert LegacyMemory.of(np.random.RandomState(bits), bits) is None
