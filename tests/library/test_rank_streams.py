"""The streams of several ranks in one process: switched, nested, interrupted, restored."""

import asyncio
import gc
import random
import signal
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rng_dcp import RNGStateError, ScopedRNG
from nemo_rng_dcp.generators import GeneratorSet
from nemo_rng_dcp.rank_streams import RankStreams
from nemo_rng_dcp.seeding import seed_all
from tests.support.streams import draw, warned

RANKS = range(4, 8)


class Failing:
    """A generator of a user's own that stops taking states."""

    kind = "failing"

    def __init__(self) -> None:
        self.state, self.fails = 0, False

    def get(self) -> int:
        return self.state

    def set(self, state: int) -> None:
        if self.fails and state != self.state:
            raise OSError("the device is gone")
        self.state = state

    def pack(self, state: int) -> bytes:
        return state.to_bytes(8, "little")

    def unpack(self, packed: bytes) -> int:
        return int.from_bytes(packed, "little")

    def seed(self, value: int) -> None:
        self.set(value)


def seeded(**registered: Any) -> RankStreams:
    """Ranks 4 to 7, each seeded with its number."""
    shared = {name: registered.pop(name) for name in list(registered) if name == "shared"}
    streams = RankStreams(GeneratorSet(None, registered, shared), RANKS, logical=True)
    for rank in reversed(RANKS):
        with streams.as_rank(rank):
            seed_all(rank)
    return streams


def fresh(rank: int, count: int = 1) -> list[float]:
    """What a rank draws first."""
    with ScopedRNG(rank):
        return draw(count)


def test_ranks_draw_from_streams_of_their_own_in_any_order() -> None:
    streams = seeded()
    drawn: dict[int, list[float]] = {rank: [] for rank in RANKS}
    for rank in (6, 4, 7, 5, 5, 4, 6, 7):
        with streams.as_rank(rank):
            assert streams.rank == rank
            drawn[rank] += draw()
    assert streams.rank == 4
    assert drawn == {rank: fresh(rank, 2) for rank in RANKS}


def test_outside_the_first_rank_is_current() -> None:
    streams = seeded()
    with streams.as_rank(6):
        draw()
    assert draw() == fresh(4)


def test_it_nests_and_leaving_gives_back_the_one_before() -> None:
    streams = seeded()
    with streams.as_rank(5):
        first = draw()
        with streams.as_rank(7):
            assert draw() == fresh(7)
            with streams.as_rank(5):
                first += draw()
            assert streams.rank == 7
        assert first + draw() == fresh(5, 3)


def by_exception(streams: RankStreams) -> None:
    with pytest.raises(KeyError), streams.as_rank(6):
        raise KeyError


def by_return(streams: RankStreams) -> None:
    def inner() -> None:
        with streams.as_rank(6):
            return

    inner()


def by_closing(streams: RankStreams) -> None:
    def inner() -> Iterator[None]:
        with streams.as_rank(6):
            yield

    generator = inner()
    next(generator)
    assert streams.rank == 6
    generator.close()  # type: ignore[attr-defined]


def by_collection(streams: RankStreams) -> None:
    def inner() -> Iterator[Any]:
        with streams.as_rank(6):
            own = yield
            yield own

    generator = inner()
    next(generator)
    generator.send(generator)  # type: ignore[attr-defined]
    del generator
    assert streams.rank == 6
    gc.collect()


@pytest.mark.parametrize("leave", [by_exception, by_return, by_closing, by_collection])
def test_whatever_ends_the_block_the_rank_before_is_back(
    leave: Callable[[RankStreams], None],
) -> None:
    streams = seeded()
    with streams.as_rank(5):
        leave(streams)
        assert streams.rank == 5
        assert draw() == fresh(5)
    leave(streams)
    assert (streams.rank, draw()) == (4, fresh(4))


def test_blocks_that_end_in_another_order_mix_no_streams() -> None:
    streams = seeded()

    def inner(rank: int) -> Iterator[None]:
        with streams.as_rank(rank):
            yield

    five, six = inner(5), inner(6)
    next(five)
    draw()
    next(six)
    draw()
    five.close()  # type: ignore[attr-defined]
    assert streams.rank == 6
    assert fresh(6, 2)[6:] == draw()
    six.close()  # type: ignore[attr-defined]
    assert (streams.rank, draw()) == (4, fresh(4))
    with streams.as_rank(5):
        assert draw() == fresh(5, 2)[6:]


@pytest.mark.parametrize("rank", [3, 8, -1, True, 4.0, "4", None])
def test_another_rank_is_refused_by_name(rank: Any) -> None:
    streams = seeded()
    with (
        pytest.raises(ValueError, match=r"this process plays ranks 4 to 7, no other. Loop over"),
        streams.as_rank(rank),
    ):
        pass
    assert draw() == fresh(4)


def test_a_cached_normal_that_was_put_back_outside_is_taken() -> None:
    streams = seeded()
    with streams.as_rank(RANKS[0]):
        np.random.standard_normal()
        with_a_normal = np.random.get_state()
        expected = np.random.standard_normal()
    np.random.set_state(with_a_normal)  # the words are where as_rank() left them
    streams.restore(streams.take())
    assert np.random.standard_normal() == expected


def test_a_restore_is_of_all_ranks_and_a_rewind_of_what_was_loaded() -> None:
    streams = seeded()
    saved = streams.take()
    for rank in RANKS[1:]:
        with streams.as_rank(rank):
            draw(rank)
    with streams.as_rank(6):
        after = streams.restore(saved)
        assert draw() == fresh(6)
    assert streams._generators.moved(after[5], saved[5]) == []
    assert [draw(), *drawn(streams, 5, 7)] == [fresh(4), fresh(5), fresh(7)]
    streams.restore({6: saved[6]}, {5: {"python": 5, "numpy": 7}})
    assert drawn(streams, 6) == [fresh(6)], "what is not named stays"
    with streams.as_rank(5):
        assert (random.gauss(0, 1), np.random.standard_normal()) == (fresh(5)[0], fresh(7)[1])


def drawn(streams: RankStreams, *ranks: int) -> list[list[float]]:
    results = []
    for rank in ranks:
        with streams.as_rank(rank):
            results.append(draw())
    return results


def packed(streams: RankStreams) -> dict[int, dict[str, bytes]]:
    return {rank: streams._generators.pack(states) for rank, states in streams.take().items()}


@pytest.mark.parametrize("current", [4, 6])
def test_a_generator_that_fails_leaves_the_streams_of_all_ranks(current: int) -> None:
    own = Failing()
    streams = seeded(own=own)
    for rank in RANKS:
        with streams.as_rank(rank):
            own.state = rank
    with streams.as_rank(current):
        saved = streams.take()
        draw()
        before, own.fails = packed(streams), True
        message = r"^own: the generator did not take its state \(OSError: the device is gone\)"
        with pytest.raises(RNGStateError, match=message):
            streams.restore(saved)
        with pytest.raises(RNGStateError, match=message), streams.as_rank(5):
            pass
        assert streams.rank == current
        own.fails = False
        assert packed(streams) == before
    assert streams.rank == 4
    assert drawn(streams, 5) == [fresh(5)]


def test_a_shared_generator_is_alike_on_all_ranks_inside_and_outside() -> None:
    shared = np.random.default_rng(1)
    streams, alone = seeded(shared=shared), np.random.default_rng(1)
    for _ in range(3):
        expected = [alone.random(), alone.random()]
        outside = shared.random()
        for rank in RANKS:
            with streams.as_rank(rank):
                assert [outside, shared.random()] == expected
        packed(streams)  # nor does a look at them change it
    assert warned(streams.warn_of_draws_outside) == []


def test_a_draw_outside_while_ranks_differ_is_refused() -> None:
    shared = np.random.default_rng(1)
    streams = seeded(shared=shared)
    saved = streams.take()
    with streams.as_rank(5):
        shared.random()
    shared.random()
    message = r"^shared: all ranks share it.* while rank 5 had drawn inside another number"
    with pytest.raises(RNGStateError, match=message), streams.as_rank(6):
        pass
    with pytest.raises(RNGStateError, match=message):
        streams.take()
    assert streams.rank == 4
    streams.restore(saved)
    assert drawn(streams, *RANKS[1:]) == [fresh(rank) for rank in RANKS[1:]]


def test_draws_outside_are_known() -> None:
    streams = seeded()
    drawn(streams, *RANKS)
    streams.take()
    assert warned(streams.warn_of_draws_outside) == []
    random.random()
    drawn(streams, 4)
    torch.rand(1)
    streams.take()
    [message] = warned(streams.warn_of_draws_outside)
    assert "python, torch drawn from outside of as_rank()" in message
    assert "Those numbers were logical rank 4's" in message
    assert warned(streams.warn_of_draws_outside) == []  # once
    random.random()
    streams.take()
    streams.restore({})
    assert warned(streams.warn_of_draws_outside) == []


def test_a_scope_is_opened_inside_of_a_rank_not_outside() -> None:
    streams = seeded()
    with streams.as_rank(5), ScopedRNG(9):
        assert draw() == fresh(9)
        with streams.as_rank(5):
            draw()
        with pytest.raises(RuntimeError, match=r"inside the ScopedRNG entered at .*streams.py"):
            streams.as_rank(6).__enter__()
    with ScopedRNG(9):
        for rank in (4, 5):
            with pytest.raises(RuntimeError, match="Open the scope inside of as_rank"):
                streams.as_rank(rank).__enter__()
    assert drawn(streams, *RANKS) == [fresh(rank) for rank in RANKS]


def test_a_scope_that_outlives_its_rank_leaves_all_streams_right() -> None:
    streams = seeded()
    inside, scope = streams.as_rank(5), ScopedRNG(9)
    inside.__enter__()
    scope.__enter__()
    draw()
    inside.__exit__(None, None, None)
    scope.__exit__(None, None, None)
    assert drawn(streams, *RANKS) == [fresh(rank) for rank in RANKS]


def test_two_threads_cannot_be_in_two_ranks_at_a_time() -> None:
    streams, refused = seeded(), []

    def enter(rank: int) -> None:
        try:
            with streams.as_rank(rank):
                assert streams.rank == rank
        except RuntimeError as error:
            refused.append(str(error))

    with streams.as_rank(5):
        for rank in (5, 6):
            thread = threading.Thread(target=enter, args=(rank,))
            thread.start()
            thread.join()
        assert draw() == fresh(5)
    assert [text.partition(":")[0] for text in refused] == [
        "as_rank(6) while another thread or task is inside of as_rank(5)"
    ]
    assert drawn(streams, 6, 7) == [fresh(6), fresh(7)]


def test_two_tasks_cannot_be_in_two_ranks_at_a_time() -> None:
    streams = seeded()

    async def play(rank: int) -> list[float]:
        with streams.as_rank(rank):
            await asyncio.sleep(0)
            return draw()

    async def play_both() -> list[Any]:
        return await asyncio.gather(play(5), play(6), return_exceptions=True)

    first, second = asyncio.run(play_both())
    assert first == fresh(5)
    assert isinstance(second, RuntimeError)
    assert (streams.rank, drawn(streams, 6)) == (4, [fresh(6)])


def test_threads_see_whole_states_of_all_ranks() -> None:
    streams = seeded()
    expected, found = packed(streams), []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            found.append(packed(streams) == expected)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(30):
        for rank in RANKS:
            with streams.as_rank(rank):
                pass
    stop.set()
    thread.join()
    assert found
    assert all(found)


def test_a_signal_handler_sees_whole_states_of_all_ranks() -> None:
    streams = seeded()
    expected, found = packed(streams), []
    before = signal.signal(signal.SIGALRM, lambda *_: found.append(packed(streams) == expected))
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    try:
        while len(found) < 50:
            for rank in RANKS:
                with streams.as_rank(rank):
                    pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(found)


def test_at_any_line_of_a_switch_and_a_restore_the_states_are_of_one_moment() -> None:
    """As a signal handler sees them."""
    streams = seeded()
    saved, expected, found = streams.take(), packed(streams), []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if "nemo_rng_dcp" not in frame.f_code.co_filename:
            return None
        if event == "line":
            sys.settrace(None)
            found.append(packed(streams) == expected)
            sys.settrace(trace)
        return trace

    others = sys.gettrace()
    sys.settrace(trace)
    try:
        with streams.as_rank(6):
            streams.restore(saved)
    finally:
        sys.settrace(others)
    assert len(found) > 100
    assert all(found)


def test_the_states_of_a_rank_take_little_memory() -> None:
    generators = GeneratorSet(None)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        streams = RankStreams(generators, range(64), logical=True)
        for rank in range(64):
            with streams.as_rank(rank):
                seed_all(rank)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # torch's 5 kB are not traced. Python's words are objects.
    assert (after - before) / 64 < 40_000
