"""Generators that fail or are interrupted while all are restored, and that other code gives up."""

import copy
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rng_dcp import RNGStateError, ScopedRNG, StatefulRNG
from nemo_rng_dcp.generators import GeneratorSet, LentGenerators
from nemo_rng_dcp.generators.numpy_random import SeedSequenceAdapter
from tests.library.test_generators import KINDS, Counter, OwnSequence, numbers
from tests.support.streams import draw, unmoved, warned


class Failing:
    """A generator of a user's own that neither takes a state nor a seed."""

    kind = "failing"

    def get(self) -> int:
        return 0

    def set(self, state: int) -> None:
        if state:
            raise OSError("the device is gone")

    def pack(self, state: int) -> bytes:
        return b"0"

    def unpack(self, packed: bytes) -> int:
        return 0

    def seed(self, value: int) -> None:
        raise OSError("the device is gone")


@pytest.mark.parametrize("change", [{"states": {"own": 1}}, {"states": {}, "seeds": {"own": 1}}])
def test_a_generator_that_fails_is_named_and_all_are_put_back(change: dict[str, Any]) -> None:
    generators, of_process = GeneratorSet(None, {"own": Failing()}), GeneratorSet(None)
    moved = of_process.take()
    change["states"] = {**moved, **change["states"]}
    of_process.restore({}, {"python": 5, "torch": 6})
    message = r"^own: the generator did not take its state \(OSError: the device is gone\); every"
    with unmoved(), pytest.raises(RNGStateError, match=message) as error:
        generators.restore(**change)
    assert isinstance(error.value.__cause__, OSError)


# Signal handlers, which Python runs in the middle of a restore.


@pytest.fixture
def handler() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Install a handler for SIGUSR1."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda function: signal.signal(signal.SIGUSR1, lambda *_: function()) and None
    signal.signal(signal.SIGUSR1, before)


class Interrupted(Counter):
    """Gets a signal while it takes a state, as often as it is told."""

    signals = 0

    def set(self, state: int) -> None:
        if self.signals:
            self.signals -= 1
            os.kill(os.getpid(), signal.SIGUSR1)
        super().set(state)


def interrupted_job() -> tuple[StatefulRNG, Interrupted, dict[str, Any], dict[str, str]]:
    """Return a job to load into: the state to load, and the fingerprints after the load."""
    noise, counter, last = torch.Generator(), Interrupted(7), np.random.default_rng(3)
    rng = StatefulRNG(1, generators={"noise": noise, "counter": counter, "last": last})
    state, loaded = rng.state_dict(), rng.fingerprint()
    draw()
    numbers(noise, 3)
    counter.draw()
    numbers(last, 3)
    if hasattr(last, "spawn"):  # NumPy 1.25 or newer
        last.spawn(2)
    return rng, counter, state, loaded


def test_a_handler_that_saves_inside_a_load_gets_the_streams_from_before(handler: Any) -> None:
    rng, counter, state, loaded = interrupted_job()
    before, found = rng.fingerprint(), []
    handler(lambda: found.append(rng.fingerprint()))
    counter.signals = 1
    rng.load_state_dict(state)
    assert found == [before]
    assert rng.fingerprint() == loaded != before
    counter.signals = 1
    rng.rewind()
    assert found == [before, loaded]


def test_a_handler_that_loads_or_enters_a_scope_inside_a_load_leaves_no_mixture(
    handler: Any,
) -> None:
    rng, counter, state, loaded = interrupted_job()
    other, at_other, found = rng.state_dict(), rng.fingerprint(), []
    draw()
    counter.draw()
    before = rng.fingerprint()

    def use() -> None:
        with ScopedRNG(seed=5):
            draw()
        found.append(rng.fingerprint())
        rng.load_state_dict(other)
        found.append(rng.fingerprint())

    handler(use)
    counter.signals = 1
    rng.load_state_dict(state)
    assert found == [before, at_other]
    assert rng.fingerprint() == loaded, "the load that was interrupted is the later one"


def test_a_handler_that_saves_while_a_scope_ends_gets_the_streams_outside(handler: Any) -> None:
    rng = StatefulRNG(1)
    before, found = rng.fingerprint(), []
    scope = ScopedRNG(seed=5).__enter__()
    assert scope._entered is not None
    adapters, real = scope._entered[0]._adapters, scope._entered[0]._adapters["numpy"]
    adapters["numpy"] = Interrupted(0)
    adapters["numpy"].signals = 1  # type: ignore[attr-defined]
    adapters["numpy"].set = lambda state: (  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGUSR1),
        real.set(state),
    )
    handler(lambda: found.append(rng.fingerprint()))
    scope.__exit__(None, None, None)
    assert found == [before]
    assert rng.fingerprint() == before


@pytest.mark.filterwarnings("ignore:inside the ScopedRNG")
def test_a_handler_that_saves_inside_a_load_inside_a_scope_gets_one_moment(handler: Any) -> None:
    rng, _, state, loaded = interrupted_job()
    before, found = rng.fingerprint(), []
    numpy = rng._generators._adapters["numpy"]
    real = numpy.set

    def set_(state: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        real(state)

    numpy.set = set_  # type: ignore[method-assign]
    handler(lambda: found.append(rng.fingerprint()))
    with ScopedRNG(seed=5):
        inside = draw()
    with ScopedRNG(seed=5):
        rng.load_state_dict(state)
        assert draw() == inside
    assert found == [before] * 3
    assert rng.fingerprint() == loaded


@pytest.mark.parametrize("scoped", [False, True])
def test_a_handler_that_reads_inside_a_restore_gets_one_moment_from_every_set(
    handler: Any, scoped: bool
) -> None:
    noise = random.Random(1)
    generators, of_process = GeneratorSet(None, {"noise": noise}), GeneratorSet(None)
    states = generators.take()
    draw()
    noise.random()

    def read() -> list[dict[str, bytes]]:
        return [each.pack(each.take()) for each in (generators, of_process)]

    before, found = read(), list[Any]()
    handler(lambda: found.append(read()))
    adapter = generators._adapters["numpy"]
    real, refusals = adapter.set, iter([OSError])

    def refused(state: Any) -> None:
        for refusal in refusals:
            raise refusal
        real(state)

    def signalled(state: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        real(state)

    with ScopedRNG(seed=5) if scoped else nullcontext():
        adapter.set = refused  # type: ignore[method-assign]
        with pytest.raises(RNGStateError):
            generators.restore(states)
        assert read() == before
        adapter.set = signalled  # type: ignore[method-assign]
        generators.restore(states)
        assert found == [before] * (3 if scoped else 1)
        adapter.set = real  # type: ignore[method-assign]
    assert generators.pack(generators.take()) == generators.pack(states)


@pytest.mark.parametrize("kind", [*KINDS, "own", "global"])
def test_what_was_unpacked_is_packed_again(kind: str) -> None:
    given = {} if kind == "global" else {"noise": Counter(5) if kind == "own" else KINDS[kind](5)}
    generators = GeneratorSet(None, given)
    draw()
    packed = generators.pack(generators.take())
    assert generators.pack(generators.unpack(packed)) == packed
    if given and kind != "own":
        numbers(given["noise"], 9)  # with a cached normal
        packed = generators.pack(generators.take())
        assert generators.pack(generators.unpack(packed)) == packed


def test_an_interrupt_while_lent_streams_are_put_back_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lent = LentGenerators(GeneratorSet(None, {"noise": np.random.default_rng(5)}), {})
    before = lent.take()
    lent.start({"python": 1, "numpy": 2, "torch": 3, "noise": 4})
    real, interrupts = random.setstate, iter([KeyboardInterrupt])

    def interrupted(state: Any) -> None:
        for interrupt in interrupts:
            raise interrupt
        real(state)

    with monkeypatch.context() as patch:
        patch.setattr(random, "setstate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lent.put_back(before)
    assert lent.pack(lent.take()) == lent.pack(before)


# Owners that exchange a registered generator.


class Owner:
    def __init__(self, kind: str) -> None:
        self.generator = KINDS[kind](5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_that_its_owner_gave_up_is_said_once_at_the_second_save(kind: str) -> None:
    owner, other = Owner(kind), Owner(kind)
    generators = {"noise": owner.generator, "other": other.generator}
    rng = StatefulRNG(1, generators=generators)
    del generators
    assert not warned(rng.state_dict) + warned(rng.state_dict)
    owner = copy.deepcopy(owner) if kind != "torch" else Owner(kind)
    assert not warned(rng.state_dict)
    [message] = warned(rng.state_dict)
    assert message.startswith("noise: nothing but this StatefulRNG holds the registered generator")
    assert "noise=lambda: sampler.generator" in message
    assert not warned(rng.state_dict) + warned(rng.state_dict)
    assert owner.generator is not other.generator


def test_generators_that_somebody_may_draw_from_are_silent() -> None:
    bits = np.random.PCG64(1)
    handle, choose = np.random.Generator(bits), KINDS["Random"](1).random
    idle = torch.Generator()
    generators = {"bits": np.random.Generator(bits), "bound": choose.__self__, "idle": idle}
    rng = StatefulRNG(1, generators={**generators, "inline": torch.Generator()})
    generators.clear()
    assert not [text for _ in range(4) for text in warned(rng.state_dict)]
    assert all((handle, choose, idle))


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_stands_for_the_generator_in_use(kind: str) -> None:
    owner = Owner(kind)
    rng = StatefulRNG(1, generators={"noise": lambda: owner.generator})
    owner.generator = KINDS[kind](77)
    state = rng.state_dict()
    expected = numbers(owner.generator)
    owner.generator = KINDS[kind](78)
    rng.load_state_dict(state)
    assert numbers(owner.generator) == expected
    owner.generator = KINDS[kind](79)
    rng.rewind()
    assert numbers(owner.generator) == expected
    rng._generators.restore({}, {"noise": 80})
    assert numbers(owner.generator) == numbers(KINDS[kind](80))


def test_a_function_is_checked_at_each_use() -> None:
    with unmoved(), pytest.raises(ValueError, match=r"noise: the function .* another generator at"):
        StatefulRNG(1, generators={"noise": lambda: torch.Generator()})
    with unmoved(), pytest.raises(ValueError, match="noise is the same generator as torch"):
        StatefulRNG(1, generators={"noise": lambda: torch.default_generator})
    with unmoved(), pytest.raises(TypeError, match="noise is a int, expected a torch"):
        StatefulRNG(1, generators={"noise": lambda: 5})
    owner, fixed = Owner("PCG64"), torch.Generator()
    rng = StatefulRNG(1, generators={"noise": lambda: owner.generator, "fixed": fixed})
    state = rng.state_dict()
    other = np.random.Generator(np.random.PCG64(OwnSequence()))
    said = r"^noise\.seed_seq: the function returned another one, after a numpy\.SeedSequence one"
    without_its_sequence = [(other, said)] if SeedSequenceAdapter.fits(owner.generator) else []
    for found, message in (
        (None, "noise: the function returned another object: noise is a NoneType"),
        (np.random.Generator(np.random.SFC64()), "returned a numpy.SFC64 generator, after a numpy"),
        *without_its_sequence,
        (fixed, "noise: the function returned the generator of fixed"),
        (torch.default_generator, "noise: the function returned the generator of torch"),
    ):
        owner.generator = found
        with unmoved(), pytest.raises(RNGStateError, match=message):
            rng.state_dict()
        with unmoved(), pytest.raises(RNGStateError, match=message):
            rng.load_state_dict(state)
