"""Trackers of named states, as Megatron-Core and Transformer Engine have them.

``tests/frameworks/test_megatron.py`` has the real one, ``test_accelerator.py`` device states.
"""

import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import RNGStateError, RNGStateWarning, StatefulRNG, tracker_generators
from tests.support.streams import unmoved, warned
from tests.support.trackers import Tracker

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def draw(tracker: Tracker, name: str) -> list[float]:
    """Draw twice from a state, and keep where that leads."""
    state = tracker.states[name]
    if isinstance(state, torch.Generator):
        return torch.randn(2, generator=state).tolist()
    if isinstance(state, torch.Tensor):
        generator = torch.Generator()
        generator.set_state(state)
        drawn = torch.randn(2, generator=generator).tolist()
        tracker.states[name] = generator.get_state()
    elif state[0] == "MT19937":
        numpy = np.random.RandomState()
        numpy.set_state(state)
        drawn = [numpy.standard_normal(), numpy.random_sample()]
        tracker.states[name] = numpy.get_state()
    else:
        python = random.Random()
        python.setstate(state)
        drawn = [python.gauss(0, 1), python.random()]
        tracker.states[name] = python.getstate()
    return drawn


def of_every_kind() -> Tracker:
    return Tracker(
        tensor=torch.Generator().manual_seed(1).get_state(),
        graph_safe=torch.Generator().manual_seed(2),
        python=random.Random(3).getstate(),
        numpy=np.random.RandomState(4).get_state(),
    )


NAMES = "tensor", "graph-safe", "python", "numpy"


def registered(tracker: Tracker, *names: str) -> dict[str, Any]:
    """With a prefix, since python and numpy are the global generators' names."""
    generators = tracker_generators(tracker, *names)
    return {f"kept_{name}": generator for name, generator in generators.items()}


def test_states_of_every_kind_come_back_bit_for_bit(tmp_path: Path) -> None:
    tracker = of_every_kind()
    generator = tracker.states["graph-safe"]
    rng = StatefulRNG(42, generators=registered(tracker))
    for name in NAMES:
        draw(tracker, name)
    with unmoved():
        dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = [draw(tracker, name) for name in NAMES]
    for _ in range(2):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path)
        assert [draw(tracker, name) for name in NAMES] == expected
        rng.rewind()
        assert [draw(tracker, name) for name in NAMES] == expected
    assert tracker.states["graph-safe"] is generator, "a captured graph draws from the old one"
    assert {name: type(state) for name, state in tracker.states.items()} == {
        name: type(state) for name, state in of_every_kind().states.items()
    }


def test_a_state_and_a_graph_safe_generator_read_each_others_records() -> None:
    before = Tracker(model_parallel_rng=torch.Generator().manual_seed(1).get_state())
    after = Tracker(model_parallel_rng=torch.Generator().manual_seed(7))
    state = StatefulRNG(1, generators=tracker_generators(before)).state_dict()
    StatefulRNG(1, generators=tracker_generators(after)).load_state_dict(state)
    assert draw(after, "model-parallel-rng") == draw(before, "model-parallel-rng")


@pytest.mark.parametrize("name", NAMES)
def test_a_new_row_starts_a_stream_from_all_64_bits_of_a_seed(name: str) -> None:
    tracker, other = of_every_kind(), of_every_kind()
    [adapter] = tracker_generators(tracker, name).values()
    [again] = tracker_generators(other, name).values()
    adapter.seed(2**40 + 1)
    again.seed(1)
    assert draw(tracker, name) != draw(other, name)
    again.seed(2**40 + 1)
    adapter.seed(2**40 + 1)
    assert draw(tracker, name) == draw(other, name)


def test_later_draws_do_not_change_what_was_taken() -> None:
    tracker = of_every_kind()
    for adapter in tracker_generators(tracker).values():
        taken = adapter.get()
        packed = adapter.pack(taken)
        adapter.seed(9)
        assert adapter.pack(taken) == packed != adapter.pack(adapter.get())


def test_names_are_chosen_and_become_identifiers() -> None:
    tracker = Tracker(model_parallel_rng=torch.get_rng_state(), data_rng=torch.get_rng_state())
    assert list(tracker_generators(tracker)) == ["model_parallel_rng", "data_rng"]
    assert list(tracker_generators(tracker, "data-rng")) == ["data_rng"]


def test_a_name_that_was_added_later_is_said_once() -> None:
    tracker = of_every_kind()
    rng = StatefulRNG(1, generators=registered(tracker, "tensor"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RNGStateWarning)
        rng.state_dict()  # the three that were not chosen are no news
    tracker.states["expert-parallel-rng"] = torch.get_rng_state()
    with pytest.warns(RNGStateWarning, match="given expert-parallel-rng after") as caught:
        rng.state_dict()
    assert caught[0].filename == __file__
    assert warned(rng.state_dict) == []


def test_a_name_that_is_gone_is_said_and_nothing_moves() -> None:
    tracker = of_every_kind()
    rng = StatefulRNG(1, generators=registered(tracker))
    state = rng.state_dict()
    del tracker.states["python"]
    with unmoved(), pytest.raises(RNGStateError, match=r"^kept_python: .* no state python any mo"):
        rng.load_state_dict(state)
    with pytest.raises(RNGStateError, match="any more"):
        rng.state_dict()


def test_a_state_that_became_something_else_is_said() -> None:
    tracker = of_every_kind()
    rng = StatefulRNG(1, generators=registered(tracker))
    for bad in (torch.zeros(3, dtype=torch.uint8), None, random.getstate()):
        tracker.states["tensor"] = bad
        with pytest.raises(RNGStateError, match=r"^kept_tensor: the tracker's tensor is no such"):
            rng.state_dict()


@pytest.mark.parametrize(
    ("tracker", "names", "kind", "message"),
    [
        (object(), (), TypeError, r"is a object, expected .* get_states\(\) and set_states\(\)$"),
        (SimpleNamespace(get_states=dict), (), TypeError, r"is a SimpleNamespace, expected an obj"),
        (Tracker(), (), ValueError, r"by model_parallel_cuda_manual_seed\(\)"),
        (of_every_kind(), ("tp",), ValueError, "no state tp, only .*tensor"),
        (Tracker(bad=5), (), TypeError, "the tracker's bad is a int, expected a state"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    tracker: Any, names: tuple[str, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        tracker_generators(tracker, *names)
