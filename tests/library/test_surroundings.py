"""What goes on around a call: forks, other threads, interrupts, another default device."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rng_dcp import ScopedRNG, StatefulRNG
from nemo_rng_dcp.generators.numpy_random import NumPyAdapter
from tests.support.streams import draw, states, unmoved


class Slow:
    """A generator that takes its time to be read, and says when that has begun."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.seconds = 0.0

    kind = "slow"

    def get(self) -> bytes:
        self.begun.set()
        time.sleep(self.seconds)
        return b"1"

    def set(self, state: bytes) -> None: ...

    def pack(self, state: bytes) -> bytes:
        return state

    def unpack(self, packed: bytes) -> bytes:
        return packed

    def seed(self, value: int) -> None: ...


def exit_code(child: int, seconds: float) -> int | None:
    """Return how a child process ended, ``None`` if it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_child_does_not_wait_for_a_thread_that_was_not_forked_with_it() -> None:
    """A DataLoader forks its workers while another thread looks at the streams."""
    slow = Slow()
    rng = StatefulRNG(1, generators={"slow": slow})
    slow.begun.clear()
    slow.seconds = 0.3
    other = threading.Thread(target=rng.fingerprint)
    other.start()
    assert slow.begun.wait(10)
    child = os.fork()
    if child == 0:
        with ScopedRNG(1):
            draw()
        os._exit(7)
    other.join()
    assert exit_code(child, seconds=20) == 7
    rng.fingerprint()  # and the parent has its lock back


@pytest.mark.parametrize("group", [False, True])
def test_the_default_device_does_not_matter(
    group: bool, fake_group: Callable[[int, int], None]
) -> None:
    """Models are made under ``torch.device("meta")`` or ``set_default_device("cuda")``."""
    if group:
        fake_group(1, 2)
    with torch.device("meta"):
        rng = StatefulRNG(1, ranked=True, generators={"shuffle": np.random.default_rng(1)})
        before = states()
        state = rng.state_dict()
        with ScopedRNG(5):
            pass
        rng.fingerprint()
        if not group:
            rng.verify_shared()
        torch.rand(1, device="cpu")
        rng.load_state_dict(state)
        rng.rewind()
    assert states() == before


def test_an_interrupt_while_a_scope_is_entered_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, interrupts = NumPyAdapter.seed, iter([KeyboardInterrupt])

    def interrupted(adapter: NumPyAdapter, value: int) -> None:
        for interrupt in interrupts:
            raise interrupt
        real(adapter, value)

    scope = ScopedRNG(5)
    with monkeypatch.context() as patch:
        # Python's generator has been seeded by then.
        patch.setattr(NumPyAdapter, "seed", interrupted)
        with unmoved(), pytest.raises(KeyboardInterrupt):
            scope.__enter__()
    with unmoved(), scope:  # it can be entered again
        draw()


def test_an_interrupt_while_streams_are_put_back_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = states()
    scope = ScopedRNG(5)
    scope.__enter__()
    real = random.setstate

    def interrupted(state: Any) -> None:
        real(state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(random, "setstate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scope.__exit__(None, None, None)
    assert states() == before


def test_a_scope_is_never_seen_half_entered_or_half_left() -> None:
    rng = StatefulRNG(0)
    known = []
    for scope in (ScopedRNG(None), ScopedRNG(5)):
        with scope:
            known.append(rng.fingerprint())
    stop = threading.Event()
    mixed = []

    def look() -> None:
        while not stop.is_set():
            seen = rng.fingerprint()
            if seen not in known:
                mixed.append(seen)

    other = threading.Thread(target=look)
    other.start()
    try:
        for _ in range(300):
            with ScopedRNG(5):
                pass
    finally:
        stop.set()
        other.join()
    assert not mixed


class Noisy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with ScopedRNG(5):
            noise = torch.randn(3)
        return x + noise


def test_a_scope_compiles() -> None:
    x = torch.zeros(3)
    expected = Noisy()(x)
    with unmoved():
        assert torch.equal(torch.compile(Noisy(), backend="eager")(x), expected)

    @torch.compile(backend="eager")
    @ScopedRNG(5)
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(3)

    with unmoved():
        assert torch.equal(decorated(x), expected)
