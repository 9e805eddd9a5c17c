"""NeMo Automodel's RNG states, its present dict and its older dataclass, known by their shape."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nemo_rng_dcp
from nemo_rng_dcp import (
    RNGState,
    RNGStateError,
    RNGStateWarning,
    ScopedRNG,
    StatefulRNG,
    automodel,
)
from nemo_rng_dcp.automodel import _get_rng_state, _restore_rng_state
from nemo_rng_dcp.generators import own_device
from nemo_rng_dcp.rng_state import packed_states
from tests.support.streams import draw, unmoved


@dataclass
class OlderRNGState:
    """A class of theirs, of which ours knows no more than the names."""

    random_rng_state: Any
    np_rng_state: Any
    torch_rng_state: Any
    cuda_rng_state: Any


def present_dict() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "random_rng_state": random.getstate(),
        "np_bit_generator": name,
        "np_keys": torch.from_numpy(keys.copy()),  # type: ignore[union-attr]
        "np_position": position,
        "np_has_gauss": has_gauss,
        "np_cached_gaussian": gauss,
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state_all(),
    }


def older_dataclass() -> OlderRNGState:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return OlderRNGState(*states, torch.cuda.get_rng_state_all())


def restore_by_object(state: Any) -> None:
    with ScopedRNG(seed=None):  # without the seeding
        rng = StatefulRNG(1)
    rng.load_state_dict(state)


def name_here(name: str) -> str:
    """Return what a stream is called on this machine, whose accelerator may be another one."""
    device = own_device()
    return device.type if name == "cuda" and device is not None else name


@pytest.fixture(params=["function", "object"])
def restore(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    return _restore_rng_state if request.param == "function" else restore_by_object


@pytest.mark.parametrize("capture", [present_dict, older_dataclass, _get_rng_state])
def test_every_form_is_restored(capture: Callable[[], Any], restore: Callable[[Any], None]) -> None:
    draw()
    random.gauss(0, 1)
    np.random.standard_normal()  # so that both have a cached gaussian
    state = capture()
    expected = draw(700)
    restore(state)
    assert draw(700) == expected


def test_the_module_has_their_names_and_takes_their_keyword() -> None:
    for name in ("RNGState", "ScopedRNG", "StatefulRNG", "init_all_rng"):
        assert getattr(automodel, name) is getattr(nemo_rng_dcp, name)
    state = automodel._get_rng_state()
    expected = draw()
    automodel.StatefulRNG(1).load_state_dict(state=state)
    assert draw() == expected


def test_our_state_is_their_dict_by_key_and_their_dataclass_by_attribute() -> None:
    draw()
    np.random.standard_normal()
    ours, present, older = _get_rng_state(), present_dict(), older_dataclass()
    assert list(ours) == list(present)
    assert {key: type(value) for key, value in ours.items()} == {
        key: type(value) for key, value in present.items()
    }
    assert torch.equal(ours["np_keys"], present["np_keys"])
    assert ours["np_keys"].dtype == present["np_keys"].dtype
    assert torch.equal(ours["torch_rng_state"], present["torch_rng_state"])
    for key in ("random_rng_state", "np_bit_generator", "np_position", "np_cached_gaussian"):
        assert ours[key] == present[key]
    assert ours.random_rng_state == older.random_rng_state
    assert np.array_equal(ours.np_rng_state[1], older.np_rng_state[1])
    assert ours.np_rng_state[2:] == older.np_rng_state[2:]


def test_our_state_is_read_without_unpickling_code(tmp_path: Path) -> None:
    state = _get_rng_state()
    expected = draw()
    torch.save(state, tmp_path / "rng.pt")
    _restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected
    _restore_rng_state(copy.deepcopy(state))
    assert draw() == expected


def test_a_load_of_automodels_state_can_be_rewound_and_is_in_loaded() -> None:
    noise = random.Random(1)
    rng = StatefulRNG(1, generators={"noise": noise})
    state = present_dict()
    expected = draw()
    noise.random()
    before = noise.getstate()
    rng.load_state_dict(state)
    assert noise.getstate() == before, "their state knows the global streams only"
    assert draw() == expected
    rng.rewind()
    assert draw() == expected
    assert rng.loaded is not None
    assert rng.loaded.rows is None


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("np_bit_generator", "PCG64", "numpy"),
        ("np_keys", torch.zeros(3), "numpy"),
        ("np_position", 625, "numpy"),
        ("np_has_gauss", 2, "numpy"),
        ("random_rng_state", (3, (), None), "python"),
        ("torch_rng_state", torch.zeros(5056), "torch"),
        ("cuda_rng_state", np.zeros(3), "cuda"),
        ("cuda_rng_state", torch.zeros(1, 16, dtype=torch.uint8), "cuda"),
    ],
)
def test_a_bad_entry_is_named_and_nothing_moves(
    key: str, value: object, name: str, restore: Callable[[Any], None]
) -> None:
    state = {**present_dict(), key: value}
    draw()
    message = f"^{name_here(name)}: the RNGState's \\w+ is malformed: (?!None$)"
    with unmoved(), pytest.raises(RNGStateError, match=message):
        restore(state)


@pytest.mark.parametrize("key", list(present_dict()))
def test_a_missing_entry_is_named_and_nothing_moves(
    key: str, restore: Callable[[Any], None]
) -> None:
    state = present_dict()
    del state[key]
    draw()
    name = key.partition("_")[0]
    name = name_here({"random": "python", "np": "numpy"}.get(name, name))
    with unmoved(), pytest.raises(RNGStateError, match=f"^{name}: the RNGState has no {key}$"):
        restore(state)


def test_what_leaves_the_global_streams_alone_does_not_restore_them() -> None:
    rng = StatefulRNG(1, generators={"own": random.Random(1)}, global_generators=False)
    with unmoved(), pytest.raises(RNGStateError, match="which this StatefulRNG leaves alone"):
        rng.load_state_dict(present_dict())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")
def test_the_warning_names_the_line_that_restored(restore: Callable[[Any], None]) -> None:
    own = [torch.zeros(16, dtype=torch.uint8)]
    for states in (own, tuple(own)):
        with pytest.warns(RNGStateWarning, match="this rank does not have: ignored") as caught:
            restore({**present_dict(), "cuda_rng_state": states})
        assert caught[0].filename == __file__


def test_the_states_of_another_number_of_devices_are_refused() -> None:
    device, own = torch.device("cuda", 0), torch.ones(16, dtype=torch.uint8)
    state = {**present_dict(), "cuda_rng_state": [own]}
    assert packed_states(state, device)["cuda"] == bytes([1] * 16)
    with pytest.raises(RNGStateError, match="malformed: 99 accelerator states, expected 1 or one"):
        packed_states({**state, "cuda_rng_state": [own] * 99}, device)


def test_an_unknown_key_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="seed"):
        _get_rng_state()["seed"]
    assert isinstance(_get_rng_state(), RNGState)


@pytest.mark.parametrize("state", [object(), [1], None, SimpleNamespace(random_rng_state=1)])
def test_what_has_another_shape_is_refused(state: Any) -> None:
    rng = StatefulRNG(1)
    with unmoved(), pytest.raises(TypeError, match="expected a mapping or an RNGState"):
        rng.load_state_dict(state)


# RNGState, a class.


def test_rng_state_round_trip_in_each_librarys_own_format() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    state = _get_rng_state()
    assert state.random_rng_state == random.getstate()
    key = state.np_rng_state[1]
    assert np.array_equal(key, np.random.get_state()[1])  # type: ignore[index]
    assert state.np_rng_state[2:] == np.random.get_state()[2:]  # type: ignore[index]
    assert torch.equal(state.torch_rng_state, torch.get_rng_state())
    expected = draw()
    _restore_rng_state(state)
    assert draw() == expected


def test_a_state_that_automodel_made_is_restored() -> None:
    state = RNGState(
        random.getstate(),
        np.random.get_state(),  # type: ignore[arg-type]
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all(),
    )
    rng = StatefulRNG(5)
    _restore_rng_state(state)
    expected = draw()
    rng.load_state_dict(state)
    assert draw() == expected
    rng.rewind()
    assert draw() == expected


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("random_rng_state", None, "python"),
        ("random_rng_state", (3, (0,) * 625, None), "python"),
        ("np_rng_state", None, "numpy"),
        ("np_rng_state", ("PCG64", {}), "numpy"),
        ("np_rng_state", {"bit_generator": "MT19937", "state": 5}, "numpy"),
        ("torch_rng_state", None, "torch"),
        ("torch_rng_state", torch.zeros(16, dtype=torch.uint8), "torch"),
        ("torch_rng_state", torch.zeros(5056), "torch"),
        ("torch_rng_state", b"bytes", "torch"),
        ("torch_rng_state", torch.zeros(5056, dtype=torch.uint8, device="meta"), "torch"),
        ("cuda_rng_state", None, "cuda"),
        ("cuda_rng_state", np.zeros(3), "cuda"),
    ],
)
def test_a_bad_field_is_named_and_nothing_moves(
    field: str, value: object, name: str, restore: Callable[[RNGState], None]
) -> None:
    state = _get_rng_state()
    draw()
    setattr(state, field, value)
    with unmoved(), pytest.raises(RNGStateError, match=rf"^{name_here(name)}: .*"):
        restore(state)


def test_an_rng_state_leaves_registered_generators_where_they_are() -> None:
    noise = random.Random(1)
    rng = StatefulRNG(1, generators={"noise": noise})
    state = _get_rng_state()
    draw()
    noise.random()
    before = noise.getstate()
    rng.load_state_dict(state)
    assert noise.getstate() == before
    noise.random()
    rng.rewind()
    assert noise.getstate() == before


def test_a_field_that_does_not_exist_is_named() -> None:
    state = _get_rng_state()
    del state.np_rng_state
    with unmoved(), pytest.raises(RNGStateError, match="numpy: the RNGState has no np_rng_state"):
        _restore_rng_state(state)
