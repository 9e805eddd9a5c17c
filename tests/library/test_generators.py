"""Generators that a job registers beside the global ones."""

import enum
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, ScopedRNG, StatefulRNG
from nemo_rng_dcp.generators import GeneratorSet
from nemo_rng_dcp.generators.numpy_random import (
    NumPyGeneratorAdapter,
    SeedSequenceAdapter,
)
from nemo_rng_dcp.record import KEY
from tests.support.jobs import job
from tests.support.records import record_of, with_stream
from tests.support.streams import draw, needs_seed_sequences, unmoved, warned

BIT_GENERATORS = [
    np.random.MT19937,
    np.random.PCG64,
    np.random.PCG64DXSM,
    np.random.Philox,
    np.random.SFC64,
]

KINDS: dict[str, Callable[[int], Any]] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "RandomState": np.random.RandomState,
    "Random": random.Random,
    **{c.__name__: lambda seed, c=c: np.random.Generator(c(seed)) for c in BIT_GENERATORS},
}


def numbers(generator: Any, count: int = 700) -> list[float]:
    """Draw half words, words and normals, so that every cache of the generator is used."""
    if isinstance(generator, torch.Generator):
        return [
            *torch.randn(count, generator=generator).tolist(),
            torch.rand(1, generator=generator).item(),
        ]
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(count)]
    if isinstance(generator, np.random.RandomState):
        return [float(x) for x in generator.standard_normal(count)]
    found: list[float] = []
    for _ in range(count // 3):
        found.append(float(generator.integers(2**31, dtype=np.uint32)))
        found += [float(generator.random()), float(generator.standard_normal())]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("already_drawn", [0, 1, 3, 700])
def test_a_registered_generator_is_restored_in_place(kind: str, already_drawn: int) -> None:
    generator = KINDS[kind](5)
    held_elsewhere = [generator]
    rng = StatefulRNG(1, generators={"noise": generator})
    assert numbers(generator, 9) == numbers(KINDS[kind](5), 9), "construction does not reseed it"
    numbers(generator, already_drawn)
    tables = rng.state_dict()
    expected = numbers(held_elsewhere[0])
    numbers(generator, 5)
    rng.load_state_dict(tables)
    assert numbers(held_elsewhere[0]) == expected
    rng.rewind()
    assert numbers(held_elsewhere[0]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_reading_moves_nothing_and_the_length_is_fixed(kind: str) -> None:
    generator = KINDS[kind](5)
    rng = StatefulRNG(1, generators={"noise": generator})
    lengths = set()
    for _ in range(5):
        lengths.add(rng.state_dict()[KEY].shape)
        before = rng.fingerprint()
        rng.state_dict()
        assert rng.fingerprint() == before
        numbers(generator, 3)
        assert rng.fingerprint()["noise"] != before["noise"]
    assert len(lengths) == 1


def test_bit_generators_of_one_seed_have_no_fingerprint_in_common() -> None:
    generators = {c.__name__: np.random.Generator(c(5)) for c in BIT_GENERATORS}
    rng = StatefulRNG(1, generators=generators, device="cpu")
    found = {name: digits for name, digits in rng.fingerprint().items() if "." not in name}
    assert len(set(found.values())) == len(found) == 3 + len(generators)


class Own(np.random.PCG64):
    """A bit generator that NumPy does not ship."""

    extra: object = 5

    @property
    def state(self) -> Any:
        return {**super().state, "extra": self.extra}

    @state.setter
    def state(self, value: Any) -> None:
        self.extra = value["extra"]
        np.random.PCG64.state.__set__(self, value)  # type: ignore[attr-defined]


def test_a_bit_generator_of_ones_own_joins_if_its_state_is_integers_and_arrays() -> None:
    bits = Own(1)
    rng = StatefulRNG(1, generators={"own": np.random.Generator(bits)})
    state = rng.state_dict()
    expected = np.random.Generator(bits).random()
    bits.extra = 6
    rng.load_state_dict(state)
    assert (np.random.Generator(bits).random(), bits.extra) == (expected, 5)
    bits.extra = 0.5
    with pytest.raises(ValueError, match=r"^own: the bit generator's state holds 0\.5"):
        StatefulRNG(1, generators={"own": np.random.Generator(bits)})


@pytest.mark.parametrize(
    "name", ["", "1st", "a-b", "a.b", "python", "numpy", "torch", "cuda", "mps", "xpu", 7]
)
def test_a_name_that_is_taken_or_no_identifier_is_refused(name: Any) -> None:
    with unmoved(), pytest.raises(ValueError, match="cannot name a generator: expected an ident"):
        StatefulRNG(1, generators={name: torch.Generator()})


@pytest.mark.parametrize(
    "generator", [None, 5, "torch", random, random.SystemRandom(), torch.Generator, np.random.PCG64]
)
def test_an_object_of_another_kind_is_refused(generator: Any) -> None:
    with unmoved(), pytest.raises(TypeError, match=r"noise is a .*expected a torch\.Generator"):
        StatefulRNG(1, generators={"noise": generator})


@pytest.mark.parametrize("argument", ["generators", "shared_generators"])
def test_a_generator_without_a_name_is_refused(argument: str) -> None:
    given: dict[str, Any] = {argument: torch.Generator()}
    with unmoved(), pytest.raises(TypeError, match=f"^{argument} is a Generator, expected a map"):
        StatefulRNG(1, **given)


def test_one_stream_is_registered_once() -> None:
    bits = np.random.PCG64(1)
    pairs: list[tuple[Any, Any]] = [
        (np.random.Generator(bits), np.random.Generator(bits)),
        (np.random.Generator(bits), np.random.RandomState(bits)),
    ]
    generator = torch.Generator()
    for first, second in [(generator, generator), *pairs]:
        with unmoved(), pytest.raises(ValueError, match="second is the same generator as first"):
            StatefulRNG(1, generators={"first": first, "second": second})
    for name, known in (
        ("torch", torch.default_generator),
        ("python", random.random.__self__),  # type: ignore[attr-defined]
        ("numpy", np.random.Generator(np.random.get_bit_generator())),
        ("numpy", np.random.RandomState(np.random.get_bit_generator())),
    ):
        with unmoved(), pytest.raises(ValueError, match=f"noise is the same generator as {name}:"):
            StatefulRNG(1, generators={"noise": known})


class Exotic(random.Random):
    def getstate(self) -> tuple[Any, ...]:
        return (3, (*range(624), "624"), None)


def test_a_random_with_a_state_of_its_own_is_refused_at_construction() -> None:
    said = "^noise: not a state of Python's random: .*(argument|integer)"
    with unmoved(), pytest.raises(ValueError, match=said):
        StatefulRNG(1, generators={"noise": Exotic()})


def test_a_random_state_over_another_algorithm_is_refused_at_construction() -> None:
    legacy = np.random.RandomState(np.random.PCG64(1))
    said = r"noise: the generator runs PCG64, .* Register a numpy\.random\.Generator"
    with unmoved(), pytest.raises(ValueError, match=said):
        StatefulRNG(1, generators={"noise": legacy})


def test_another_algorithm_in_the_checkpoint_is_an_error_that_names_both() -> None:
    saved = StatefulRNG(1, generators={"noise": np.random.Generator(np.random.PCG64(1))})
    tables = saved.state_dict()
    generator = np.random.Generator(np.random.Philox(1))
    rng = StatefulRNG(1, generators={"noise": generator})
    before = rng.fingerprint()
    draw()
    message = r"^noise: .* numpy.PCG64 generator, and this job's is numpy.Philox"
    with unmoved(), pytest.raises(RNGStateError, match=message):
        rng.load_state_dict(tables)
    assert rng.fingerprint()["noise"] == before["noise"]


class Counter:
    """A generator that no library ships: it counts."""

    kind = "counter"

    def __init__(self, start: int) -> None:
        self.next = start

    def draw(self) -> int:
        self.next += 1
        return self.next - 1

    def get(self) -> int:
        return self.next

    def set(self, state: int) -> None:
        self.next = state

    def pack(self, state: int) -> bytes:
        return state.to_bytes(3, "little")

    def unpack(self, packed: bytes) -> int:
        if len(packed) != 3:
            raise ValueError(f"a count has {len(packed)} bytes, expected 3")
        return int.from_bytes(packed, "little")

    def seed(self, value: int) -> None:
        self.next = value


def test_a_generator_of_ones_own_joins_through_the_adapter_protocol() -> None:
    counter = Counter(7)
    rng = StatefulRNG(1, generators={"counter": counter})
    state = rng.state_dict()
    assert [counter.draw(), counter.draw()] == [7, 8]
    rng.load_state_dict(state)
    assert counter.draw() == 7
    with unmoved(), pytest.raises(RNGStateError, match=r"^counter: a count has 4 bytes"):
        rng.load_state_dict(with_stream(state, "counter", bytes(4)))
    assert counter.draw() == 8


@pytest.mark.parametrize("packed", [b"", "text", torch.tensor([1]), None])
def test_a_state_that_could_not_be_loaded_is_refused_at_registration(packed: Any) -> None:
    counter = Counter(1)
    counter.pack = lambda state: packed  # type: ignore[method-assign]
    with unmoved(), pytest.raises(ValueError, match=r"^counter: pack\(\) gave .*expected at least"):
        StatefulRNG(1, generators={"counter": counter})
    counter.pack = lambda state: b"1234"  # type: ignore[method-assign]
    with unmoved(), pytest.raises(ValueError, match=r"^counter: a count has 4 bytes"):
        StatefulRNG(1, generators={"counter": counter})


def test_a_generator_that_cannot_be_read_is_named() -> None:
    def broken() -> int:
        raise ValueError("out of order")

    counter = Counter(1)
    rng = StatefulRNG(1, generators={"counter": counter})
    counter.get = broken  # type: ignore[method-assign]
    with unmoved(), pytest.raises(RNGStateError, match=r"^counter: out of order"):
        rng.state_dict()


class Stuck(Counter):
    """Takes a state only once it was asked twice."""

    refusals = 1

    def set(self, state: int) -> None:
        self.next = -1  # half done
        if self.refusals:
            self.refusals -= 1
            raise OSError("stuck")
        super().set(state)


def test_a_setter_that_raises_halfway_leaves_every_stream_where_it_was() -> None:
    noise, stuck, last = torch.Generator().manual_seed(5), Stuck(7), np.random.default_rng(5)
    rng = StatefulRNG(1, generators={"noise": noise, "stuck": stuck, "last": last})
    tables = rng.state_dict()
    draw()
    numbers(noise, 3)
    stuck.draw()
    numbers(last, 3)
    before = rng.fingerprint()
    message = "^stuck: the .* not take its state .*OSError: stuck.* back where it was before$"
    with unmoved(), pytest.raises(RNGStateError, match=message) as error:
        rng.load_state_dict(tables)
    assert isinstance(error.value.__cause__, OSError)
    assert rng.fingerprint() == before
    rng.load_state_dict(tables)
    assert stuck.draw() == 7


def test_a_generator_that_does_not_take_back_its_own_state_is_named() -> None:
    stuck = Stuck(7)
    rng = StatefulRNG(1, generators={"stuck": stuck})
    stuck.refusals = 9
    message = r"^stuck: .* its own earlier state \(OSError: stuck\)\. Its stream may have moved"
    with unmoved(), pytest.raises(RNGStateError, match=message):
        rng.load_state_dict(rng.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_seeding_uses_all_64_bits_and_agrees_with_the_library_below_32(kind: str) -> None:
    generator = KINDS[kind](0)
    registered = GeneratorSet(None, {"noise": generator}, global_generators=False)
    registered.restore({}, {"noise": 77})
    assert numbers(generator, 9) == numbers(KINDS[kind](77), 9)
    found = set()
    values = (0, 5, 2**32 - 1, 2**32, 5 + 2**32, 5 + 2**63, 2**64 - 1)
    for value in values:
        registered.restore({}, {"noise": value})
        found.add(tuple(numbers(generator, 9)))
    assert len(found) == len(values)


def test_a_name_is_per_row_or_shared_and_not_both() -> None:
    for shared in ({"noise": random.Random(2)}, {"other": (noise := random.Random(1))}):
        with unmoved(), pytest.raises(ValueError, match=r"choose one|same generator as noise"):
            StatefulRNG(1, generators={"noise": noise}, shared_generators=shared)


def test_without_global_generators_nothing_else_is_seeded_stored_or_moved() -> None:
    noise = random.Random(1)
    with unmoved():
        rng = StatefulRNG(1, ranked=True, generators={"noise": noise}, global_generators=False)
        state = rng.state_dict()
    assert list(record_of(state).streams) == list(rng.fingerprint()) == ["noise"]
    with ScopedRNG(seed=5):
        assert warned(rng.state_dict) == []
    expected = noise.random()
    draw()
    with unmoved():
        rng.load_state_dict(state)
    assert noise.random() == expected
    with unmoved(), pytest.raises(TypeError, match="global_generators is 0"):
        StatefulRNG(1, global_generators=0)  # type: ignore[arg-type]


@given(
    st.sampled_from(BIT_GENERATORS),
    st.dictionaries(st.integers(0, 5000), st.integers(0, 255), max_size=4),
)
def test_no_malformed_state_is_half_taken(kind: Any, damage: dict[int, int]) -> None:
    """Whatever the numbers are: refused with a ValueError, or exactly what is then read back."""
    adapter = NumPyGeneratorAdapter(np.random.Generator(kind(3)))
    packed = bytearray(adapter.pack(adapter.get()))
    for index, value in damage.items():
        packed[index % len(packed)] = value
    try:
        state = adapter.unpack(bytes(packed))
    except ValueError:
        return
    adapter.set(state)
    assert adapter.pack(adapter.get()) == packed
    adapter._bit_generator.random_raw(700)  # and NumPy stays within its buffers


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        (np.random.Philox, 6 + 32, "buffer_pos is 255, expected 0 to 4"),
        (np.random.MT19937, 7 + 2497, r"pos is 65\d\d\d, expected 0 to 624"),
        (np.random.PCG64, 5, "has_uint32 is 255, expected 0 to 1"),
        (np.random.SFC64, 5 + 52, r"NumPy (refuses|takes)"),
        (np.random.PCG64, 0, "NumPy takes the state only in part: some of it is out of range"),
    ],
)
def test_numbers_that_numpy_would_take_and_stumble_over_are_refused(
    kind: Any, place: int, message: str
) -> None:
    adapter = NumPyGeneratorAdapter(np.random.Generator(kind(3)))
    packed = bytearray(adapter.pack(adapter.get()))
    packed[place] = 255
    with pytest.raises(ValueError, match=message):
        adapter.unpack(bytes(packed))


def test_an_adapter_whose_kind_is_no_string_is_refused() -> None:
    for kind in (Kind.COUNTER, Kind, None, 5):
        counter = Counter(1)
        counter.kind = kind  # type: ignore[assignment]
        with (
            unmoved(),
            pytest.raises(TypeError, match=r"^counter: the adapter's kind is .*a string"),
        ):
            StatefulRNG(1, generators={"counter": counter})


class Kind(enum.IntEnum):
    COUNTER = 1


class OwnRandom(random.Random):
    """The documented way to have another generator behind Python's methods."""

    drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return self.drawn / 1000 % 1


class OwnBits(random.Random):
    def getrandbits(self, k: int) -> int:
        return 5


class Helpful(random.Random):
    def coin(self) -> bool:
        return self.random() < 0.5


@pytest.mark.parametrize("kind", [OwnRandom, OwnBits])
def test_a_random_with_numbers_of_its_own_is_refused(kind: type[random.Random]) -> None:
    with unmoved(), pytest.raises(TypeError, match=f"^noise is a {kind.__name__}, .*GeneratorAdap"):
        StatefulRNG(1, generators={"noise": kind()})
    StatefulRNG(1, generators={"noise": Helpful()})


# What a Generator spawns from.


def children(generator: np.random.Generator, count: int = 2) -> list[int]:
    return [int(child.integers(2**62)) for child in generator.spawn(count)]


@needs_seed_sequences
@pytest.mark.parametrize("kind", BIT_GENERATORS)
@pytest.mark.parametrize(
    "entropy", [5, 0, 2**127 + 3, [5, 0], [2**40, 7], [], np.array([1, 2**33]), None]
)
@pytest.mark.parametrize("nested", [0, 2])
def test_children_go_on_after_a_load(kind: Any, entropy: Any, nested: int) -> None:
    generator = np.random.Generator(kind(np.random.SeedSequence(entropy, pool_size=4 + nested)))
    for _ in range(nested):
        generator = generator.spawn(3)[2]
    rng = StatefulRNG(1, generators={"noise": generator})
    used = children(generator)
    state, at_save = rng.state_dict(), rng.fingerprint()
    expected, drawn = children(generator), generator.random()
    # Another process has another seed, and its own generator is restored in place.
    other = np.random.Generator(kind(99))
    resumed = StatefulRNG(1, generators={"noise": other})
    resumed.load_state_dict(state)
    assert children(other) == expected != used
    assert other.random() == drawn
    resumed.rewind()
    assert resumed.fingerprint() == at_save
    assert children(other) == expected
    assert resumed.state_dict()[KEY].shape == state[KEY].shape


@needs_seed_sequences
def test_a_sequence_that_was_taken_does_not_count_on() -> None:
    generator = np.random.default_rng(5)
    adapter = SeedSequenceAdapter(generator)
    state = adapter.get()
    packed = adapter.pack(state)
    generator.spawn(1)
    assert adapter.pack(state) == packed != adapter.pack(adapter.get())
    adapter.seed(7)
    assert children(generator) == children(np.random.default_rng(7))


@needs_seed_sequences
@pytest.mark.parametrize("entropy", [0, 2**100 + 1])
def test_an_entropy_that_is_a_number_stays_one(entropy: int) -> None:
    generator = np.random.default_rng(entropy)
    rng = StatefulRNG(1, generators={"noise": generator})
    rng.load_state_dict(rng.state_dict())
    draw()
    rng.load_state_dict(rng.state_dict())
    assert generator.bit_generator.seed_seq.entropy == entropy  # type: ignore[attr-defined]


@needs_seed_sequences
def test_a_seed_sequence_for_which_there_is_no_room_is_refused() -> None:
    message = (
        r"^noise.seed_seq: its SeedSequence has 13 words .* a pool of 4, .* room for 12 and 1024: "
        r".* numpy\.random\.default_rng\(derive_seed\("
    )
    with unmoved(), pytest.raises(ValueError, match=message):
        StatefulRNG(1, generators={"noise": np.random.default_rng(range(13))})
    StatefulRNG(1, generators={"noise": np.random.default_rng(range(12))})


@needs_seed_sequences
@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, 3, "2 and 0 words and a pool of 3"),
        (0, 1025, "2 and 0 words and a pool of 1025"),
        (1, 13, "13 and 0 words"),
        (1, 1, "1 and 0 words"),  # and there is a second one
        (2, 11, "2 and 11 words"),
        (15, 5, "2 and 0 words"),
    ],
)
def test_a_malformed_seed_sequence_is_refused(place: int, number: int, message: str) -> None:
    adapter = SeedSequenceAdapter(np.random.default_rng([3, 4]))
    words = np.frombuffer(bytearray(adapter.pack(adapter.get())), "<u4")
    words[place] = number
    with pytest.raises(ValueError, match=f"^a SeedSequence of {message}.* makes no sense$"):
        adapter.unpack(words.tobytes())


class OwnSequence(np.random.bit_generator.ISeedSequence):
    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.ones(n_words, dtype)


class BeforeNumPy2(np.random.PCG64):
    def __setstate__(self, state: Any) -> None:
        raise TypeError


def test_a_sequence_that_cannot_be_put_back_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not SeedSequenceAdapter.fits(np.random.Generator(np.random.PCG64(OwnSequence())))
    generator = np.random.default_rng(5)
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "PCG64", BeforeNumPy2)
        assert not SeedSequenceAdapter.fits(generator)


@needs_seed_sequences
def test_spawned_generators_of_shared_ranks_that_differ_have_other_fingerprints() -> None:
    generator = np.random.default_rng(5)
    rng = StatefulRNG(1, shared_generators={"order": generator})
    before = rng.fingerprint()
    generator.spawn(1)
    after = rng.fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"order.seed_seq"}
    assert record_of(rng.state_dict()).streams["order.seed_seq"].shared


@needs_seed_sequences
@given(st.dictionaries(st.integers(0, 63), st.integers(0, 255), max_size=6))
def test_no_malformed_seed_sequence_is_half_taken(damage: dict[int, int]) -> None:
    adapter = SeedSequenceAdapter(np.random.default_rng([3, 4]))
    packed = bytearray(adapter.pack(adapter.get()))
    assert len(packed) == 64
    for index, value in damage.items():
        packed[index] = value
    try:
        state = adapter.unpack(bytes(packed))
    except ValueError:
        return
    adapter.set(state)
    assert adapter.pack(adapter.get()) == packed


def job_with_children(path: Path, save: bool) -> list[int]:
    noise, order = np.random.default_rng(5), np.random.default_rng(6)
    generators = {"generators": {"noise": noise}, "shared_generators": {"order": order}}
    rng = StatefulRNG(1, ranked=True, **generators)  # type: ignore[arg-type]
    if save:
        used = children(noise) + children(order)
        dcp.save({"rng": rng}, checkpoint_id=path)
        assert not set(used) & set(children(noise) + children(order))
        return children(noise) + children(order)
    dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
    children(noise)
    children(order)
    return children(noise) + children(order)


@needs_seed_sequences
@pytest.mark.filterwarnings("ignore:RNG state")
def test_new_rows_spawn_children_of_their_own(tmp_path: Path) -> None:
    [saved] = job(1, job_with_children, tmp_path, True)
    found = job(3, job_with_children, tmp_path, False)
    assert found[0] == saved
    assert len({row[0] for row in found}) == 3
    assert all(row[2:] == saved[2:] for row in found), "shared ones go on alike"


# Threads that draw at the same time: NumPy draws arrays without the interpreter's lock.


def advance(generator: Any) -> None:
    if isinstance(generator, np.random.RandomState):
        generator.random_sample(300_000)
    else:
        generator.random(300_000)


@pytest.mark.parametrize("kind", ["RandomState", *(c.__name__ for c in BIT_GENERATORS)])
def test_states_are_whole_while_a_thread_draws(kind: str) -> None:
    """Every draw is of one size, so a whole state is one of the few between draws."""
    draws = 40
    chain, generator = KINDS[kind](5), KINDS[kind](5)
    adapters = GeneratorSet(None, {"noise": chain}, global_generators=False)
    whole = set()
    for _ in range(draws + 1):
        whole.add(adapters.pack(adapters.take())["noise"])
        advance(chain)
    generators = GeneratorSet(None, {"noise": generator}, global_generators=False)
    start = generators.take()
    for _ in range(3):
        thread = threading.Thread(target=lambda: [advance(generator) for _ in range(draws)])
        thread.start()
        while thread.is_alive():
            assert generators.pack(generators.take())["noise"] in whole
        generators.restore(start)
    for _ in range(20):
        thread = threading.Thread(target=advance, args=(generator,))
        thread.start()
        generators.restore(start)
        thread.join()
        assert generators.pack(generators.take())["noise"] in whole, "restored beside a draw"
        generators.restore(start)
    for _ in range(20):
        thread = threading.Thread(target=advance, args=(generator,))
        thread.start()
        generators.restore({}, {"noise": 5})
        thread.join()
        assert generators.pack(generators.take())["noise"] in whole, "seeded beside a draw"


def test_the_global_numpy_generator_is_whole_while_a_thread_draws() -> None:
    chain, whole = np.random.RandomState(5), set()
    adapters = GeneratorSet(None, {"noise": chain}, global_generators=False)
    for _ in range(61):
        whole.add(adapters.pack(adapters.take())["noise"])
        chain.random_sample(300_000)
    generators = GeneratorSet(None)
    np.random.seed(5)
    target = lambda: [np.random.random_sample(300_000) for _ in range(60)]  # noqa: E731
    thread = threading.Thread(target=target)
    thread.start()
    while thread.is_alive():
        assert generators.pack(generators.take())["numpy"] in whole


def test_numpys_lock_is_free_after_an_error() -> None:
    generator = np.random.Generator(Own(1))
    adapter = NumPyGeneratorAdapter(generator)
    with pytest.raises(KeyError):
        adapter.set({})
    found: list[bool] = []
    lock = generator.bit_generator.lock
    thread = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    assert found == [True]
