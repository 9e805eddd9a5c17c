"""Random uses and random damage, against a model of what every stream must be.

``make fuzz`` runs this file for longer: FUZZ_EXAMPLES is the number of cases of each test.
"""

import os
import random
import warnings
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from altered import altered, record_of, with_stream
from nemo_rng_dcp import RNGStateError, ScopedRNG, StatefulRNG, init_all_rng
from nemo_rng_dcp.record import KEY
from streams import draw, states, unmoved

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
STEPS = 12

KINDS = st.sampled_from(["python", "numpy", "torch", "noise", "shuffle"])


def create(seed: int) -> tuple[StatefulRNG, dict[str, Any]]:
    generators = {
        "noise": torch.Generator().manual_seed(seed),
        "shuffle": np.random.default_rng(seed),
    }
    return StatefulRNG(seed, ranked=True, generators=generators), generators


class Model:
    """The five streams once more, as objects that nothing else touches."""

    def __init__(self, seed: int) -> None:
        self.streams: dict[str, Any] = {
            "python": random.Random(seed),
            "numpy": np.random.RandomState(seed),
            "torch": torch.Generator().manual_seed(seed),
            "noise": torch.Generator().manual_seed(seed),
            "shuffle": np.random.default_rng(seed),
        }

    def reseed_globals(self, seed: int) -> None:
        self.streams["python"].seed(seed)
        self.streams["numpy"].seed(seed)
        self.streams["torch"].manual_seed(seed)

    def draw(self, kind: str, count: int) -> list[float]:
        stream = self.streams[kind]
        if kind == "python":
            return [stream.gauss(0, 1) for _ in range(count)]
        if isinstance(stream, torch.Generator):
            return [torch.randn(1, generator=stream).item() for _ in range(count)]
        return [float(stream.standard_normal()) for _ in range(count)]

    def state(self) -> dict[str, Any]:
        found = {}
        for kind, stream in self.streams.items():
            if kind == "python":
                found[kind] = stream.getstate()
            elif kind == "shuffle":
                found[kind] = stream.bit_generator.state
            else:
                state = stream.get_state()
                found[kind] = state.clone() if isinstance(state, torch.Tensor) else state
        return found

    def restore(self, state: dict[str, Any]) -> None:
        for kind, stream in self.streams.items():
            if kind == "python":
                stream.setstate(state[kind])
            elif kind == "shuffle":
                stream.bit_generator.state = state[kind]
            else:
                stream.set_state(state[kind])


class Interleavings(RuleBasedStateMachine):
    """Draws, saves, loads, failed loads, scopes and rewinds in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = ScopedRNG(None)
        self.outside.__enter__()
        self.rng, self.generators = create(3)
        self.model = Model(3)
        self.saves: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
        self.loaded: dict[str, Any] | None = None
        self.scopes: list[tuple[ScopedRNG, dict[str, Any]]] = []

    def teardown(self) -> None:
        while self.scopes:
            self.scopes.pop()[0].__exit__(None, None, None)
        self.outside.__exit__(None, None, None)

    def real_draw(self, kind: str, count: int) -> list[float]:
        if kind == "python":
            return [random.gauss(0, 1) for _ in range(count)]
        if kind == "numpy":
            return [float(np.random.standard_normal()) for _ in range(count)]
        if kind == "shuffle":
            return [float(self.generators[kind].standard_normal()) for _ in range(count)]
        generator = self.generators.get(kind, torch.default_generator)
        return [torch.randn(1, generator=generator).item() for _ in range(count)]

    @rule(kind=KINDS, count=st.sampled_from([1, 2, 3, 311, 624, 625]))
    def draws(self, kind: str, count: int) -> None:
        assert self.real_draw(kind, count) == self.model.draw(kind, count)

    @rule()
    def save(self) -> None:
        self.saves.append((self.rng.state_dict(), self.model.state()))

    @precondition(lambda self: self.saves)
    @rule(which=st.integers(0, 9))
    def load(self, which: int) -> None:
        tables, state = self.saves[which % len(self.saves)]
        self.rng.load_state_dict({name: table.clone() for name, table in tables.items()})
        self.model.restore(state)
        self.loaded = state

    @precondition(lambda self: self.saves)
    @rule(which=st.integers(0, 9), bit=st.integers(0, 62), at=st.integers(0, 9999))
    def load_damaged(self, which: int, bit: int, at: int) -> None:
        table = self.saves[which % len(self.saves)][0][KEY].clone()
        table[at % len(table)] ^= 1 << bit
        with unmoved():
            try:
                self.rng.load_state_dict({KEY: table})
            except RNGStateError as error:
                assert str(error).startswith("rng_streams: ")  # noqa: PT017
            else:
                raise AssertionError("a flipped bit was not seen")

    @precondition(lambda self: self.loaded is not None)
    @rule()
    def rewind(self) -> None:
        assert self.loaded is not None
        self.rng.rewind()
        self.model.restore(self.loaded)

    @precondition(lambda self: len(self.scopes) < 3)
    @rule(seed=st.none() | st.integers(0, 2**32 - 1))
    def enter(self, seed: int | None) -> None:
        scope = ScopedRNG(seed)
        self.scopes.append((scope, self.model.state()))
        scope.__enter__()
        if seed is not None:
            self.model.reseed_globals(seed)

    @precondition(lambda self: self.scopes)
    @rule()
    def leave(self) -> None:
        scope, state = self.scopes.pop()
        scope.__exit__(None, None, None)
        # A scope is about the global streams; registered ones go on.
        here = self.model.state()
        self.model.restore({**state, "noise": here["noise"], "shuffle": here["shuffle"]})

    @rule(seed=st.integers(0, 2**32 - 1))
    def reseed(self, seed: int) -> None:
        init_all_rng(seed)
        self.model.reseed_globals(seed)

    @invariant()
    def looking_moves_nothing(self) -> None:
        before = self.rng.fingerprint()
        with unmoved():
            self.rng.state_dict()
        assert self.rng.fingerprint() == before


Interleavings.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None
)
TestInterleavings = Interleavings.TestCase

DAMAGE = st.one_of(
    st.tuples(st.just("number"), st.integers(0, 700), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("number"), st.integers(0, 700), st.integers(0, 700)),
    st.tuples(st.just("byte"), st.integers(0, 6000), st.integers(0, 255)),
    st.tuples(st.just("length"), st.integers(-700, 700), st.just(0)),
    st.tuples(st.just("swap"), KINDS, st.just(0)),
)


def damaged(content: bytes, kind: str, where: int, value: int) -> bytes:
    if kind == "number":
        where = where % (len(content) // 8) * 8
        return content[:where] + value.to_bytes(8, "little") + content[where + 8 :]
    if kind == "byte":
        where %= len(content)
        return content[:where] + bytes([value]) + content[where + 1 :]
    return (content + bytes(700))[: max(0, len(content) + where)]


@settings(max_examples=3 * EXAMPLES, deadline=None)
@given(name=KINDS, damage=DAMAGE)
def test_a_damaged_state_whose_check_word_fits_is_refused_by_name_or_is_what_it_says(
    name: str, damage: tuple[str, Any, int]
) -> None:
    kind, what, value = damage
    with ScopedRNG(1):
        rng, _ = create(5)
        state = rng.state_dict()
        streams = record_of(state).streams
        draw()
        content = streams[what].state if kind == "swap" else streams[name].state
        if kind != "swap":
            content = damaged(content, kind, what, value)
        bad = with_stream(state, name, content)
        before, registered = states(), rng.fingerprint()
        try:
            rng.load_state_dict(bad)
        except RNGStateError as error:
            assert str(error).startswith(f"{name}: ")  # noqa: PT017
            assert states() == before
            assert rng.fingerprint() == registered
        else:
            # What was taken was taken whole: reading it back gives the same bytes.
            assert record_of(rng.state_dict()).streams[name].state == content


HEADS = st.dictionaries(
    st.sampled_from(["row", "rows", "world_size", "seed", "resizes", "taken_at", "torch_version"]),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3),
    max_size=3,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(fields=HEADS, cut=st.integers(0, 3000), bit=st.integers(0, 63), at=st.integers(0, 9999))
def test_a_damaged_record_restores_nothing_or_all(
    fields: dict[str, int], cut: int, bit: int, at: int
) -> None:
    """Heads of other rows and moments with check words that fit, and flips that do not."""
    with ScopedRNG(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rng, _ = create(5)
        state = rng.state_dict()
        expected = rng.fingerprint()
        draw()
        before = rng.fingerprint()
        table = altered(state, **fields)[KEY]
        if cut < len(table):
            table[cut] ^= (1 << bit) - 2**64 * (bit == 63)
        try:
            rng.load_state_dict({KEY: table[: at or None]})
        except RNGStateError:
            assert rng.fingerprint() == before
        else:
            assert rng.fingerprint() == expected
