import asyncio
import functools
import itertools
import random
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nemo_rng_dcp import RNGStateError, RNGStateWarning, ScopedRNG, StatefulRNG, init_all_rng
from tests.library.test_generators import Counter
from tests.support.jobs import job
from tests.support.streams import draw, unmoved, warned


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

    async def both() -> AsyncIterator[int]:
        yield 1

    for function in (generator, coroutine, both, functools.partial(generator)):
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


# Scopes that end in another order than they began, and what uses the streams inside one.


def batches(seed: int) -> Iterator[list[float]]:
    with ScopedRNG(seed=seed):
        while True:
            yield draw()


def test_scopes_of_generator_functions_may_end_in_any_order() -> None:
    init_all_rng(1)
    expected = draw(3)
    for order in itertools.permutations(range(3)):
        init_all_rng(1)
        opened = [batches(seed) for seed in (7, 8, 9)]
        for scope in opened:
            next(scope)
        messages = [message for place in order for message in warned(opened[place].close)]
        assert draw(3) == expected
        late = [i for i, place in enumerate(order) if any(p > place for p in order[i + 1 :])]
        assert len(messages) == len(late)
        assert all("ended before the one that was entered inside it" in m for m in messages)
        assert all(f"{__file__}:" in m for m in messages)


def test_the_streams_outside_come_back_where_warnings_are_errors() -> None:
    init_all_rng(1)
    expected = draw()
    init_all_rng(1)
    outer, inner = batches(7), batches(8)
    next(outer)
    next(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RNGStateWarning)
        with pytest.raises(RNGStateWarning, match="ended before"):
            outer.close()
        inner.close()
    assert draw() == expected


def test_scopes_of_asyncio_tasks_and_threads_leave_the_streams_outside() -> None:
    async def task(seed: int, seconds: float) -> None:
        with ScopedRNG(seed=seed):
            await asyncio.sleep(seconds)
            draw()

    async def tasks() -> None:
        await asyncio.gather(task(7, 0.01), task(8, 0.03))

    def threads() -> None:
        barrier, first_left = threading.Barrier(2), threading.Event()

        def run(first: bool) -> None:
            if not first:
                barrier.wait()
            with ScopedRNG(seed=7 + first):
                if first:
                    barrier.wait()
                    time.sleep(0.05)
                else:
                    first_left.wait()
            first_left.set()

        both = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()

    init_all_rng(1)
    expected = draw()
    for run in (lambda: asyncio.run(tasks()), threads):
        init_all_rng(1)
        [message] = warned(run)
        assert "ended before the one" in message
        assert draw() == expected


def test_inside_a_scope_a_save_holds_the_streams_that_come_back_and_says_so() -> None:
    noise = np.random.default_rng(5)
    rng = StatefulRNG(1, generators={"noise": noise})
    at_save = rng.fingerprint()
    with ScopedRNG(seed=7), ScopedRNG(seed=8):
        state: dict[str, torch.Tensor] = {}
        [message] = warned(lambda: state.update(rng.state_dict()))
        assert rng.fingerprint() == at_save
        inside = draw()
    [of_decorated] = warned(lambda: ScopedRNG(seed=8)(rng.state_dict)())
    for text in (message, of_decorated):
        assert text.startswith(f"inside the ScopedRNG entered at {__file__}:")
    assert "the record holds the streams that come back" in message
    with ScopedRNG(seed=8):
        assert draw() == inside
    draw()
    noise.random()
    rng.load_state_dict(state)
    assert rng.fingerprint() == at_save


def test_a_scope_that_was_entered_in_compiled_code_is_said_to_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = StatefulRNG(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        scope = ScopedRNG(seed=7).__enter__()
    [message] = warned(rng.state_dict)
    scope.__exit__(None, None, None)
    assert message.startswith("inside the ScopedRNG entered at compiled code: ")


@pytest.mark.parametrize("rewind", [False, True])
def test_inside_a_scope_a_load_or_rewind_acts_on_the_streams_that_come_back(rewind: bool) -> None:
    noise = np.random.default_rng(5)
    rng = StatefulRNG(1, generators={"noise": noise})
    state, loaded = rng.state_dict(), rng.fingerprint()
    draw()
    rng.load_state_dict(state)
    draw(2)
    noise.random()
    with ScopedRNG(seed=7):
        expected = draw(5)
    with ScopedRNG(seed=7):
        found = draw(2)
        [message] = warned(rng.rewind if rewind else lambda: rng.load_state_dict(state))
        found += draw(3)
        assert found == expected, "the scope's own streams go on"
    assert "what is loaded or rewound are the streams that come back" in message
    assert rng.fingerprint() == loaded
    with ScopedRNG(seed=7), warnings.catch_warnings():
        warnings.simplefilter("error", RNGStateWarning)
        with unmoved(), pytest.raises(RNGStateWarning):
            rng.rewind()


def test_new_rows_fork_inside_a_scope_as_outside(fake_group: Callable[[int, int], None]) -> None:
    state = StatefulRNG(1, ranked=True).state_dict()
    fake_group(1, 2)
    found = []
    for scope in (nullcontext(), ScopedRNG(seed=7)):
        rng = StatefulRNG(1, ranked=True)
        with scope, warnings.catch_warnings():
            warnings.simplefilter("ignore", RNGStateWarning)
            rng.load_state_dict(state)
        found.append(rng.fingerprint())
    assert found[0] == found[1]


def test_a_load_that_fails_inside_a_scope_moves_nothing() -> None:
    rng = StatefulRNG(1, generators={"failing": (failing := Counter(0))})
    state = rng.state_dict()
    draw()
    before = rng.fingerprint()
    with ScopedRNG(seed=7), warnings.catch_warnings():
        warnings.simplefilter("ignore", RNGStateWarning)
        failing.set = lambda state: 1 / 0  # type: ignore[method-assign, assignment]
        with unmoved(), pytest.raises(RNGStateError):
            rng.load_state_dict(state)
    assert rng.fingerprint() == before


def test_a_job_inside_a_scope_is_silent_and_its_own() -> None:
    with ScopedRNG(seed=3):
        with ScopedRNG(seed=4):
            rng = StatefulRNG(1)  # in a scope that ends
        inner = StatefulRNG(1)
        for job in (rng, inner):
            state, expected = job.state_dict(), draw()
            assert not warned(functools.partial(job.load_state_dict, state))
            assert draw() == expected
            job.rewind()
            assert draw() == expected
