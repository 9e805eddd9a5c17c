"""What goes on around a call: forks, other threads, interrupts, another default device."""

import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from nemo_rng_dcp import ScopedRNG, StatefulRNG, torch_adapters
from nemo_rng_dcp.adapters import PythonAdapter
from streams import draw, states, unmoved


class Slow:
    """A generator that takes its time to be read, and says when that has begun."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.seconds = 0.0

    def read(self) -> torch.Tensor:
        self.begun.set()
        time.sleep(self.seconds)
        return torch.tensor([1])

    def check(self, state: torch.Tensor) -> None: ...

    def write(self, state: torch.Tensor) -> None: ...

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


def test_another_thread_may_ask_for_the_state_during_a_load() -> None:
    """A load in which the checkpoint lacks a table compares it with what this thread was given."""
    rng = StatefulRNG(1, generators={"noise": torch.Generator()})
    saved = rng.state_dict()
    expected = draw()
    given = rng.state_dict()
    draw()
    other = threading.Thread(target=rng.state_dict)
    other.start()
    other.join()
    rng.load_state_dict({**saved, "noise": given["noise"]})
    assert draw() == expected


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
        tables = rng.state_dict()
        with ScopedRNG(5):
            pass
        rng.fingerprint()
        if not group:
            rng.verify_shared()
        rng.load_state_dict(tables)
        rng.rewind()
    assert states() == before


def test_an_interrupt_while_a_scope_is_entered_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: object, value: int) -> None:
        raise KeyboardInterrupt

    scope = ScopedRNG(5)
    with monkeypatch.context() as patch:
        # Python and NumPy have been seeded by then.
        patch.setattr(torch_adapters.TorchAdapter, "seed", interrupted)
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
    real = PythonAdapter.write

    def interrupted(self: PythonAdapter, state: torch.Tensor) -> None:
        real(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PythonAdapter, "write", interrupted)
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
