import functools
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nemo_rng_dcp import RNGStateError, ScopedRNG, StatefulRNG, init_all_rng
from tests.support.jobs import job
from tests.support.streams import draw, unmoved


def weights_of_replicas(scoped: bool) -> list[float]:
    StatefulRNG(42, ranked=True)
    with ScopedRNG(7) if scoped else nullcontext():
        model = torch.nn.Linear(2, 2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    weight: Any = model.weight
    numbers: list[float] = weight.to_local().flatten().tolist()
    return numbers


def test_replicas_start_alike_if_the_model_is_built_in_a_scope() -> None:
    """And not otherwise with ``ranked=True``: FSDP2 sends no weights to the other replicas."""
    first, second = job(2, weights_of_replicas, True)
    assert first == second
    first, second = job(2, weights_of_replicas, False)
    assert first != second


def test_draws_inside_are_those_of_the_seed_and_leave_no_trace() -> None:
    init_all_rng(7)
    expected = draw(2)
    with unmoved(), ScopedRNG(7):
        assert draw(2) == expected


def test_the_default_seed_is_that_of_nemo_automodel() -> None:
    init_all_rng(95050)
    expected = draw()
    with ScopedRNG():
        assert draw() == expected


def test_cached_gaussians_come_back() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.randn(1)
    with unmoved(), ScopedRNG(7):
        draw()


def test_streams_come_back_after_an_exception() -> None:
    @ScopedRNG(7)
    def failing() -> None:
        draw()
        raise KeyError

    with unmoved(), pytest.raises(KeyError):
        failing()


def test_seed_none_only_puts_back() -> None:
    with unmoved():
        with ScopedRNG(None):
            inside = draw()
        with ScopedRNG(None):
            assert draw() == inside


def test_scopes_nest() -> None:
    with unmoved(), ScopedRNG(1):
        draw()
        with unmoved(), ScopedRNG(2):
            draw()


def test_one_object_is_entered_once_at_a_time() -> None:
    scope = ScopedRNG(1)
    with unmoved(), scope:
        with unmoved(), pytest.raises(RuntimeError, match="entered already"), scope:
            pass
        draw()
    with unmoved(), scope:  # and again, once it was left
        draw()


def test_a_decorated_function_may_recurse() -> None:
    @ScopedRNG(3)
    def numbers(depth: int) -> list[float]:
        """Docstring."""
        if depth:
            assert numbers(depth - 1) == first
        return draw()

    init_all_rng(3)
    first = draw()
    with unmoved():
        assert numbers(2) == first
    assert (numbers.__name__, numbers.__doc__) == ("numbers", "Docstring.")


def test_functions_whose_body_runs_later_are_not_decorated() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    for function in (generator, coroutine, functools.partial(generator)):
        with pytest.raises(TypeError, match="runs after the call"):
            ScopedRNG(1)(function)


def test_the_rank_is_that_of_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = ScopedRNG(10, ranked=True)
    monkeypatch.setenv("RANK", "4")
    init_all_rng(14)
    expected = draw()
    with scope:
        assert draw() == expected


@pytest.mark.parametrize(("ranked", "seed"), [(False, 10), (True, 14)])
def test_a_decorated_function_is_ranked_as_the_scope_is(
    ranked: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = ScopedRNG(10, ranked=ranked)(draw)
    monkeypatch.setenv("RANK", "4")
    init_all_rng(seed)
    expected = draw()
    with unmoved():
        assert function() == expected
    with ScopedRNG(10, ranked=ranked):
        assert draw() == expected


def test_a_seed_that_the_rank_makes_too_large_is_refused_on_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = ScopedRNG(2**32 - 4, ranked=True)
    monkeypatch.setenv("RANK", "4")
    with unmoved(), pytest.raises(ValueError, match="the rank or row adds 4"), scope:
        pass
    monkeypatch.setenv("RANK", "3")
    with unmoved(), scope:  # a refused entry was none
        draw()


def test_a_scope_is_left_by_whoever_raises_and_can_be_entered_again() -> None:
    scope = ScopedRNG(1)
    for _ in range(2):
        with unmoved(), pytest.raises(KeyError), scope:  # noqa: PT012
            draw()
            raise KeyError


def test_a_generator_exchanged_inside_is_named_and_the_others_come_back() -> None:
    before = np.random.get_bit_generator()
    python, torch_state = random.getstate(), torch.get_rng_state()
    try:
        message = (
            r"^numpy: .*own earlier state \(ValueError: .*\)\. Was it .*set_bit_generator\(\)\?$"
        )
        with pytest.raises(RNGStateError, match=message), ScopedRNG(1):
            np.random.set_bit_generator(np.random.PCG64(1))
    finally:
        np.random.set_bit_generator(before)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)
