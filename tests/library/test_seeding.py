"""Seeds: of all streams, of a purpose (``derive_seed``), of a worker (``seed_worker``)."""

import hashlib
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from nemo_rng_dcp import ScopedRNG, StatefulRNG, derive_seed, init_all_rng, seed_worker
from nemo_rng_dcp.seeding import derive_seeds
from tests.support import jobs
from tests.support.streams import draw, states, unmoved


def test_the_seed_reaches_every_stream_as_its_own_library_would_seed_it() -> None:
    init_all_rng(1234)
    found = [random.random(), float(np.random.random()), torch.rand(1).item()]
    generator = torch.Generator().manual_seed(1234)
    assert found == [
        random.Random(1234).random(),
        float(np.random.RandomState(1234).random_sample()),
        torch.rand(1, generator=generator).item(),
    ]


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(5), np.uint8(5)])
def test_seeds_in_range(seed: int) -> None:
    init_all_rng(seed)
    first = draw()
    init_all_rng(int(seed))
    assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1.0, "1", None, True, np.True_, [1]])
@pytest.mark.parametrize("use", [init_all_rng, StatefulRNG, ScopedRNG])
def test_other_seeds_are_refused_by_name(seed: Any, use: Any) -> None:
    if use is not init_all_rng and seed is None:
        return  # None is their way to keep the streams
    expected = ": expected 0 <= seed and seed + rank <= 2**32 - 1"
    if type(seed) is not int:
        expected = f" ({type(seed).__name__}), expected an integer from 0 to 2**32 - 1"
    with unmoved(), pytest.raises(ValueError, match=re.escape(f"the seed is {seed!r}{expected}")):
        use(seed)


def test_logical_ranks_need_a_seed() -> None:
    with unmoved(), pytest.raises(ValueError, match="logical_ranks=4 needs a seed"):
        StatefulRNG(None, ranked=True, logical_ranks=4)


def test_seed_and_rank_must_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    init_all_rng(2**32 - 4, ranked=True)
    StatefulRNG(2**32 - 4, ranked=True)
    StatefulRNG(2**32 - 1)  # the same on every rank
    for use in (init_all_rng, StatefulRNG):
        with unmoved(), pytest.raises(ValueError, match="4294967293 and the rank or row adds 3"):
            use(2**32 - 3, ranked=True)
    scope = ScopedRNG(2**32 - 3, ranked=True)
    with unmoved(), pytest.raises(ValueError, match="adds 3"), scope:
        pass


@pytest.mark.parametrize("use", [init_all_rng, StatefulRNG, ScopedRNG])
@pytest.mark.parametrize("ranked", [1, 0, None, "yes"])
def test_ranked_is_a_bool(ranked: Any, use: Any) -> None:
    said = f"ranked is {ranked!r} ({type(ranked).__name__}), expected True or False"
    with unmoved(), pytest.raises(TypeError, match=re.escape(said)):
        use(1, ranked=ranked)


def test_ranked_adds_the_rank_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    init_all_rng(10, ranked=True)
    ranked = draw()
    init_all_rng(15)
    assert draw() == ranked


def test_the_group_outranks_the_variable(monkeypatch: pytest.MonkeyPatch, fake_group: Any) -> None:
    monkeypatch.setenv("RANK", "5")
    fake_group(2, 4)
    init_all_rng(10, ranked=True)
    ranked = draw()
    init_all_rng(12)
    assert draw() == ranked


@pytest.mark.parametrize("value", ["", "-1", "two", "1.0"])
def test_a_malformed_rank_variable_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", value)
    with unmoved(), pytest.raises(ValueError, match="RANK is"):
        init_all_rng(1, ranked=True)


# derive_seed.

# The mapping is promised for ever: a change to one of these numbers is a change of every job.
VECTORS = [
    ((0,), 0xA31198EDCF509613),
    ((1,), 0xAF82FE70E9F30C31),
    ((2**32 - 1,), 0xE7808DDC781976AF),
    ((2**64,), 0x5E48699DD02E7066),
    ((10**40,), 0x8CAA66B0E247E345),
    ((0, ""), 0x057BB891F4107C17),
    ((0, 0), 0x90A20610378DFF37),
    ((0, "0"), 0x99688E1077D62122),
    ((42, "shuffle", 0), 0x2C5893A8F3A37669),
    ((42, "shuffle", 1), 0x4775ED7BB1A80C55),
    ((42, "shuffle", -1), 0x8B07F7CDA0E6F0D8),
    ((42, "augment", 3, 123456), 0xF54A4E5826710606),
    ((42, "ab", "c"), 0xF212CE2A3215C70F),
    ((42, "a", "bc"), 0x2B9DC3FD5601E9AB),
    ((42, "abc"), 0xFF56DFAF79EE44FC),
    ((42, 127), 0x78D9DA3F8739812A),
    ((42, 128), 0x5FAEF17E706754AA),
    ((42, -128), 0x64101EBCD27B8FF0),
    ((42, -129), 0xA5A91679C5FE4F0A),
    ((42, 2**200), 0x30E3CC0039343A9D),
    ((42, -(2**200)), 0x5124FAD6A9687C54),
    ((42, "Zufällig 随机 🎲"), 0x3351B2EFB453BE21),
    ((42, "\udcff"), 0x3100C0A903F16272),
    ((42, "a\0b"), 0xDD85CB0C94904726),
]

integers = st.integers() | st.integers(-(2**9), 2**9) | st.integers(-(2**300), 2**300)
paths = st.lists(integers | st.text(st.characters(codec=None)), max_size=4)


@pytest.mark.parametrize(("arguments", "expected"), VECTORS, ids=lambda value: ascii(value)[:40])
def test_derived_seeds_never_change(arguments: tuple[Any, ...], expected: int) -> None:
    assert derive_seed(*arguments, bits=64) == expected
    assert derive_seed(*arguments) == expected % 2**32


def test_derive_seed_hashes_the_bytes_of_its_docstring() -> None:
    seed = b"i\x02\0\0\0\0\0\0\0" + b"\xc8\x00"  # 200 needs a ninth bit, for the sign
    path = b"s\x02\0\0\0\0\0\0\0" + b"\xc3\xa9" + b"i\x01\0\0\0\0\0\0\0" + b"\xff"
    digest = hashlib.blake2b(seed + path, digest_size=8, person=b"nemo_rng_dcp").digest()
    assert derive_seed(200, "é", -1, bits=64) == int.from_bytes(digest, "little")


@given(st.integers(0, 2**70), paths, st.integers(0, 2**70), paths)
def test_other_arguments_give_other_seeds(a: int, path: Any, b: int, other: Any) -> None:
    same = derive_seed(a, *path, bits=64) == derive_seed(b, *other, bits=64)
    assert same == ((a, path) == (b, other))


@given(st.lists(st.text("01a", max_size=3), min_size=2, max_size=4))
def test_strings_cannot_flow_into_each_other(path: list[str]) -> None:
    joined = derive_seed(0, "".join(path), bits=64)
    assert joined != derive_seed(0, *path, bits=64) != derive_seed(0, *path, "", bits=64)


@given(st.integers(-(2**300), 2**300))
def test_an_integer_is_not_its_text_or_its_bytes(number: int) -> None:
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    alike = {number, -number, number % 2**32, number % 2**64}
    others = [*alike, str(number), content.decode("latin-1")]
    assert len({derive_seed(0, other, bits=64) for other in others}) == len(others)


@given(st.integers(0, 2**70), paths, st.integers(1, 64))
def test_fewer_bits_are_the_low_bits(seed: int, path: Any, bits: int) -> None:
    result = derive_seed(seed, *path, bits=bits)
    assert type(result) is int
    assert result == derive_seed(seed, *path, bits=64) % 2**bits


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_seed_is_no_element_of_the_path(seed: int, number: int) -> None:
    assume(seed != number)
    assert derive_seed(seed, number, bits=64) != derive_seed(number, seed, bits=64)
    assert derive_seed(derive_seed(seed, "a", bits=64), "b") != derive_seed(seed, "a", "b")


def test_seeds_of_neighbours_are_spread() -> None:
    seeds = [derive_seed(0, "augment", epoch, i) for epoch in range(10) for i in range(1000)]
    assert len(set(seeds)) == len(seeds)
    for bit in range(32):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 5000) < 250, f"bit {bit} is 1 in {ones} of 10,000 seeds"


@pytest.mark.parametrize("number", [np.int64(-5), np.int8(-5)])
def test_numpy_integers_are_integers(number: Any) -> None:
    assert derive_seed(np.uint32(7), number, bits=np.int64(64)) == derive_seed(7, -5, bits=64)
    assert derive_seed(7, np.str_("a")) == derive_seed(7, "a")


@pytest.mark.parametrize("seed", [-1, -(2**70), 1.0, "1", b"1", None, True, np.True_, [1]])
def test_derive_seed_refuses_other_seeds_by_name(seed: Any) -> None:
    said = f"the seed is {seed!r} ({type(seed).__name__}), expected an integer of at least 0"
    with pytest.raises(ValueError, match=re.escape(said)):
        derive_seed(seed)


@pytest.mark.parametrize("element", [1.0, b"a", None, True, np.False_, np.float64(1), (1,), [1]])
def test_derive_seed_refuses_other_elements_by_name(element: Any) -> None:
    for path in ([element], ["a", element], [element, 1]):
        kind = type(element).__name__
        with pytest.raises(TypeError, match=rf"the path holds .* \({kind}\), expected") as caught:
            derive_seed(1, *path)
        assert repr(element) in str(caught.value)


def test_derive_seed_refuses_other_lengths_by_name() -> None:
    for bits in (0, -1, 65):
        with pytest.raises(ValueError, match=f"bits is {bits}, expected 1 to 64"):
            derive_seed(1, bits=bits)
    wrong: Any
    for wrong in (True, 32.0, "32", None):
        said = f"bits is {wrong!r} ({type(wrong).__name__}), expected an integer"
        with pytest.raises(TypeError, match=re.escape(said)):
            derive_seed(1, bits=wrong)


def test_derive_seed_moves_no_stream() -> None:
    with unmoved():
        derive_seed(1, "a", 2)


# seed_worker.


def test_seed_worker_follows_the_worker_seed_alone() -> None:
    torch.manual_seed(7)
    seed_worker(0)
    first = states()
    draw(3)
    seed_worker(1)
    assert states() == first
    assert torch.initial_seed() == 7
    torch.manual_seed(8)
    seed_worker(0)
    assert not any(state == first[name] for name, state in states().items())


def test_seed_worker_gives_each_library_a_stream_of_its_own() -> None:
    """Python, NumPy and torch run one algorithm: from one seed they would draw the same words."""
    torch.manual_seed(7)
    seed_worker(0)
    seeds = [derive_seed(7, "worker", name, bits=64) for name in ("python", "numpy", "torch")]
    assert len(set(seeds)) == 3
    python, numpy, torch_word = [random.Random(seed).getrandbits(32) for seed in seeds]
    assert random.getrandbits(32) == python
    assert np.random.randint(2**32, dtype=np.uint32) == numpy
    # The range in which torch shows its 32-bit words, see MT19937State.
    assert torch.empty((), dtype=torch.int64).random_(0, 2**28 - 1) == torch_word % (2**28 - 1)


def test_seed_worker_uses_every_bit_of_the_worker_seed() -> None:
    """torch.manual_seed drops the upper half, and ranks whose lower halves agree would collide."""
    found = []
    for worker_seed in (5, 5 + 2**32, 5 + 2**62):
        torch.manual_seed(worker_seed)
        seed_worker(0)
        found.append(draw())
    assert len({number for numbers in found for number in numbers}) == 3 * len(found[0])


def test_the_seeds_of_several_are_those_of_each() -> None:
    seeds = {"a": 0, "b": 2**70}
    for path, bits in ((), 1), ((7, "x"), 32), ((-1,), 64):
        expected = {name: derive_seed(seed, *path, bits=bits) for name, seed in seeds.items()}
        assert derive_seeds(seeds, *path, bits=bits) == expected


class Streams(Dataset[Any]):
    """Every item is what its worker draws, and the worker's seed."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return draw(), torch.initial_seed()


# A worker of the fork server has, as a spawned one, no stream of this process, and starts at once.
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_are_seeded_from_torchs_worker_seed(start_method: str) -> None:
    jobs.preload()

    def items() -> list[Any]:
        return list(
            DataLoader(
                Streams(),
                batch_size=None,
                num_workers=2,
                worker_init_fn=seed_worker,
                generator=torch.Generator().manual_seed(1),
                multiprocessing_context=start_method,
            )
        )

    with unmoved():
        found = items()
    numbers = [number for drawn, _ in found for number in drawn]
    assert len(set(numbers)) == len(numbers), "workers share a stream"
    torch.manual_seed(found[0][1])
    seed_worker(0)
    assert draw() == found[0][0]
    if start_method == "fork":
        assert items() == found
