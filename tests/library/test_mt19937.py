import random

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_rng_dcp.generators.mt19937 import TORCH_LENGTH, WORDS, MT19937State, to_words
from nemo_rng_dcp.generators.numpy_random import NumPyAdapter
from nemo_rng_dcp.generators.python_random import PythonAdapter

THREE_BLOCKS = 3 * WORDS


def state_at(seed: int, position: int, gauss: float | None = None) -> MT19937State:
    numpy = np.random.RandomState(seed)
    numpy.randint(2**32, size=WORDS, dtype=np.uint32)
    return MT19937State(numpy.get_state()[1], position, gauss)  # type: ignore[arg-type, index]


def words_of_python(state: MT19937State) -> list[int]:
    generator = random.Random()
    generator.setstate(state.to_python())
    return [generator.getrandbits(32) for _ in range(THREE_BLOCKS)]


def words_of_numpy(state: MT19937State) -> list[int]:
    generator = np.random.RandomState()
    generator.set_state(state.to_numpy())
    return generator.randint(2**32, size=THREE_BLOCKS, dtype=np.uint32).tolist()


def words_of_torch(state: MT19937State) -> list[int]:
    """torch shows its words modulo a range below 2**28, so twice is needed for all 32 bits."""
    shown = []
    for limit in (2**28 - 1, 2**27 - 1):
        generator = torch.Generator()
        generator.set_state(state.to_torch())
        words = torch.empty(THREE_BLOCKS, dtype=torch.int64)
        shown.append(words.random_(0, limit, generator=generator).tolist())
    return shown  # type: ignore[return-value]


@pytest.mark.parametrize("position", [1, 2, 227, 623, 624])
@pytest.mark.parametrize("seed", [0, 20261121])
def test_all_three_libraries_draw_the_same_words(seed: int, position: int) -> None:
    state = state_at(seed, position)
    words = words_of_numpy(state)
    assert words_of_python(state) == words
    assert words_of_torch(state) == [
        [word % (2**28 - 1) for word in words],
        [word % (2**27 - 1) for word in words],
    ]


@example(seed=0, position=1, gauss=-0.0)
@given(
    seed=st.integers(0, 2**32 - 1),
    position=st.integers(1, WORDS),
    gauss=st.none() | st.floats(-9, 9),
)
def test_conversions_lose_nothing(seed: int, position: int, gauss: float | None) -> None:
    state = state_at(seed, position, gauss)
    back = [
        MT19937State.from_bytes(state.to_bytes()),
        MT19937State.from_python(state.to_python()),
        MT19937State.from_numpy(state.to_numpy()),
    ]
    for other in back:
        assert np.array_equal(other.words, state.words)
        assert other.position == position
        # As text, because 0.0 and -0.0 are equal but not the same bits.
        assert repr(other.gauss) == repr(gauss)
    of_torch = torch.Generator()
    of_torch.set_state(state.to_torch())
    assert of_torch.initial_seed() == 0
    other = MT19937State.from_torch(of_torch.get_state())
    assert np.array_equal(other.words, state.words)
    assert other.position == position


@pytest.mark.parametrize("draws", [0, 1, 2, 623, 624, 625, 1248, 1249])
def test_states_of_live_generators_are_understood(draws: int) -> None:
    torch_generator, numpy = torch.Generator().manual_seed(9), np.random.RandomState(9)
    torch.empty(draws, dtype=torch.int64).random_(0, 100, generator=torch_generator)
    numpy.randint(2**32, size=draws, dtype=np.uint32)
    from_torch = MT19937State.from_torch(torch_generator.get_state())
    from_numpy = MT19937State.from_numpy(numpy.get_state())
    assert words_of_numpy(from_torch) == words_of_numpy(from_numpy)
    assert from_numpy.to_numpy()[2:] == numpy.get_state()[2:]


def test_both_forms_of_a_numpy_state_are_one_state() -> None:
    numpy = np.random.RandomState(9)
    numpy.standard_normal()
    as_tuple = MT19937State.from_numpy(numpy.get_state())
    as_dict = MT19937State.from_numpy(numpy.get_state(legacy=False))
    assert as_tuple.gauss is not None
    assert as_tuple.to_bytes() == as_dict.to_bytes()


def with_number(index: int, value: int) -> bytes:
    packed = bytearray(state_at(1, 5).to_bytes())
    packed[4 * index : 4 * index + 4] = value.to_bytes(4, "little")
    return bytes(packed)


POSITION, HAS_GAUSS, GAUSS = WORDS, WORDS + 1, WORDS + 2


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (with_number(POSITION, 2**32 - 1), "position is 4294967295"),
        (with_number(POSITION, 625), "position is 625"),
        (with_number(HAS_GAUSS, 2), "has-gauss flag is 2"),
        (with_number(GAUSS, 1), "has-gauss flag is 0"),
        (with_number(GAUSS + 1, 2**31), "has-gauss flag is 0"),
        (bytes(2512), "all words are zero"),
        (bytes(2504), "2504 bytes, expected 2512"),
    ],
)
def test_malformed_bytes_are_refused(packed: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MT19937State.from_bytes(packed)


def test_python_and_numpy_pack_as_the_algorithm_does() -> None:
    """The adapters pack by themselves, for speed."""
    for gauss in (None, -0.0, 1.5):
        state = state_at(1, 5, gauss)
        python, numpy = random.Random(), np.random.RandomState()
        python.setstate(state.to_python())
        numpy.set_state(state.to_numpy())
        for adapter in (PythonAdapter(python), NumPyAdapter(numpy)):
            assert adapter.pack(adapter.get()) == state.to_bytes()  # type: ignore[arg-type]


SHAPE_OF_PYTHON = r"^not a state of Python's random: expected \(3, \(\.\.\.\), gauss_next\)"
NUMBERS_OF_PYTHON = "^not a state of Python's random: expected 625 integers"
WORDS_OF_PYTHON = "^not a state of Python's random: .*(argument|format|int too large)"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, SHAPE_OF_PYTHON),
        ((), SHAPE_OF_PYTHON),
        ((2, (1,) * 625, None), SHAPE_OF_PYTHON),
        ((3, (1,) * 624, None), NUMBERS_OF_PYTHON),
        ((3, [1] * 625, None), NUMBERS_OF_PYTHON),
        ((3, (2**32,) + (1,) * 624, None), WORDS_OF_PYTHON),
        ((3, (-1,) + (1,) * 624, None), WORDS_OF_PYTHON),
        ((3, (2**70,) + (1,) * 624, None), WORDS_OF_PYTHON),
        ((3, ("a",) + (1,) * 624, None), WORDS_OF_PYTHON),
        ((3, (1,) * 624 + (625,), None), "^the position is 625, expected 0 to 624"),
        ((3, (1,) * 624 + (1.5,), None), r"^the position is 1\.5, expected 0 to 624"),
        ((3, (1,) * 625, "0.5"), r"^the cached gaussian is '0\.5', expected a float"),
    ],
)
def test_malformed_states_of_python_are_refused(state: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MT19937State.from_python(state)  # type: ignore[arg-type]


WORDS_OF_ONE = np.ones(WORDS, dtype=np.uint32)
FLOATS = WORDS_OF_ONE.astype(float)
TOO_LARGE = np.array([0, *[2**32] * (WORDS - 1)])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "^not an MT19937 state of NumPy: found 'NoneType'"),
        ((), "^not an MT19937 state of NumPy: found 'tuple'"),
        ({}, "^not an MT19937 state of NumPy: found None"),
        ({"bit_generator": "PCG64", "state": {}}, "^not an MT19937 state of NumPy: found 'PCG64'"),
        (("PCG64", WORDS_OF_ONE, 0, 0, 0.0), "^not an MT19937 state of NumPy: found 'PCG64'"),
        (("MT19937", WORDS_OF_ONE, 0), "^not an MT19937 state of NumPy"),
        (("MT19937", WORDS_OF_ONE[:-1], 0, 0, 0.0), r"^the words are uint32 \(623,\), expected"),
        (("MT19937", WORDS_OF_ONE, 625, 0, 0.0), "^the position is 625, expected 0 to 624"),
        (("MT19937", WORDS_OF_ONE, -1, 0, 0.0), "^the position is -1, expected 0 to 624"),
        (("MT19937", WORDS_OF_ONE, None, 0, 0.0), "^the position is None, expected 0 to 624"),
        (("MT19937", WORDS_OF_ONE, 0, 2, 0.0), "^the has-gauss flag is 2, expected 0 or 1"),
        (("MT19937", FLOATS, 0, 0, 0.0), r"^the words are float64 \(624,\), expected integers"),
        (("MT19937", TOO_LARGE, 0, 0, 0.0), r"^a word is 4294967296, expected 0 to 2\*\*32 - 1"),
        (("MT19937", -TOO_LARGE, 0, 0, 0.0), "^a word is -4294967296, expected"),
        (("MT19937", None, 0, 0, 0.0), r"^the words are object \(\), expected integers"),
    ],
)
def test_malformed_states_of_numpy_are_refused(state: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MT19937State.from_numpy(state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("position", "offset", "value", "message"),
    [
        (5, 8, 0, "seeded 1, left 512, next 5"),
        (5, 8, 200, "seeded 1, left 712, next 5"),
        (5, 12, 2, "seeded 2, left"),
        (5, 16, 9, "next 9"),  # which does not fit left
        (624, 17, 3, "seeded 1, left 1, next 768"),  # not read, and refused by torch all the same
        (5, 28, 1, "^a word is"),  # the upper half of word 0
    ],
)
def test_malformed_states_of_torch_are_refused(
    position: int, offset: int, value: int, message: str
) -> None:
    state = state_at(1, position).to_torch()
    state[offset] = value
    with pytest.raises(ValueError, match=message):
        MT19937State.from_torch(state)


def test_a_state_of_another_size_or_dtype_is_no_state_of_torch() -> None:
    for state in (torch.zeros(16, dtype=torch.uint8), torch.zeros(TORCH_LENGTH)):
        with pytest.raises(ValueError, match=r"expected torch\.uint8"):
            MT19937State.from_torch(state)


def test_a_block_of_which_nothing_is_drawn_is_a_state() -> None:
    """NumPy can be there; torch has no such form and refuses it."""
    fresh = np.random.RandomState(5)
    words = np.asarray(fresh.get_state()[1])  # type: ignore[index]
    state = MT19937State(words, 0)
    again = MT19937State.from_bytes(state.to_bytes())
    assert (again.words.tolist(), again.position, again.gauss) == (words.tolist(), 0, None)
    fresh.set_state(again.to_numpy())
    twin = random.Random()
    twin.setstate(again.to_python())
    assert [int(n) for n in fresh.randint(2**32, size=3, dtype=np.uint32)] == [
        twin.getrandbits(32) for _ in range(3)
    ]
    with pytest.raises(ValueError, match="nothing of a block is drawn"):
        state.to_torch()


def test_a_position_may_be_a_number_of_numpy() -> None:
    """As in a state that was read from a file of arrays."""
    assert MT19937State.from_numpy(("MT19937", WORDS_OF_ONE, np.int64(7), 0, 0.0)).position == 7


def test_the_state_of_a_bit_generator_is_taken_as_one_without_a_gaussian() -> None:
    bits = np.random.MT19937(5)
    state = MT19937State.from_numpy(bits.state)
    assert state.gauss is None
    assert state.words.tolist() == bits.state["state"]["key"].tolist()


WORDS_OF_5 = np.asarray(np.random.RandomState(5).get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((WORDS_OF_5, 625), "the position is 625, expected 0 to 624"),
        ((WORDS_OF_5, -1), "the position is -1, expected 0 to 624"),
        ((WORDS_OF_5, 1.0), r"the position is 1\.0, expected"),
        ((WORDS_OF_5, 1, 1), "the cached gaussian is 1, expected a float"),
        ((WORDS_OF_5[:-1], 1), r"the words are uint32 \(623,\), expected uint32 \(624,\)"),
        ((WORDS_OF_5.astype(np.int64), 1), r"the words are int64 \(624,\)"),
        ((WORDS_OF_5 * 0, 1), "all words are zero"),
    ],
)
def test_fields_out_of_range_are_named(fields: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MT19937State(*fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.zeros(3), r"the words are float64 \(3,\), expected integers"),
        (np.zeros(0, dtype=np.int64), r"the words are int64 \(0,\), expected integers"),
        (np.array([5, -2, 3]), "a word is -2, expected 0 to"),
        (np.array([5, 2**32, 3]), "a word is 4294967296, expected 0 to"),
    ],
)
def test_words_that_do_not_fit_are_refused_by_value(numbers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_words(numbers)  # type: ignore[arg-type]


def test_words_at_the_ends_of_their_range_fit() -> None:
    assert to_words(np.array([0, 2**32 - 1])).tolist() == [0, 2**32 - 1]
    assert to_words(np.array([7])).tolist() == [7]
