"""Damaged and mixed records, and random uses against a model of what every stream must be.

Case ``i`` is made of ``random.Random(f"{SEED} {i}")`` alone. A failure names its case; with
``FUZZ_FIRST=<case> FUZZ_RECORDS=1`` (or ``FUZZ_SEQUENCES=1``) that case runs by itself.
``make fuzz`` runs 1,000,000 records and 100,000 sequences.
"""

import hashlib
import json
import os
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rng_dcp import RNGStateError, ScopedRNG, StatefulRNG, init_all_rng
from nemo_rng_dcp.record import KEY, Record, Stream
from tests.support.records import record_of
from tests.support.streams import unmoved

SEED = os.environ.get("FUZZ_SEED", "1")
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
RECORDS = int(os.environ.get("FUZZ_RECORDS", "2000"))
SEQUENCES = int(os.environ.get("FUZZ_SEQUENCES", "200"))
PARTS = 4
"""Tests of each kind, so that several processes share the cases."""

KINDS = {
    "python": "python",
    "numpy": "numpy",
    "torch": "torch.cpu",
    "noise": "torch.cpu",
    "shuffle": "numpy.PCG64",
}
NAMES = tuple(KINDS)
HEAD = 14 * 8
Random = random.Random


def create(seed: int) -> tuple[StatefulRNG, dict[str, Any]]:
    noise, shuffle = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    rng = StatefulRNG(
        seed, ranked=True, generators={"noise": noise}, shared_generators={"shuffle": shuffle}
    )
    return rng, {"noise": noise, "shuffle": shuffle}


@contextmanager
def case(index: int) -> Iterator[Random]:
    try:
        yield Random(f"{SEED} {index}")
    except Exception as error:
        raise AssertionError(f"case FUZZ_SEED={SEED} FUZZ_FIRST={index}: {error!r}") from error


def cases(part: int, count: int) -> range:
    return range(FIRST + part, FIRST + count, PARTS)


# Records. What is not exactly what some StatefulRNG wrote is refused and moves nothing; what is
# taken is taken bit for bit.


class Saved:
    """Records of three rows at three moments, as bytes."""

    def __init__(self, rng: StatefulRNG, draw: Callable[[], object]) -> None:
        self.moments = []
        for _ in range(3):
            draw()
            record = record_of(rng.state_dict())
            self.moments.append([to_bytes(replace(record, row=row, rows=3)) for row in range(3)])

    def any(self, rnd: Random) -> bytes:
        return rnd.choice(rnd.choice(self.moments))


def to_bytes(record: Record) -> bytes:
    return record.to_tensor().numpy().tobytes()


def sealed(content: bytes) -> bytes:
    """Put a check word that fits in the place of the last one."""
    return content[:-8] + hashlib.blake2b(content[:-8], digest_size=8).digest()


def flip_bits(rnd: Random, content: bytes, saved: Saved) -> bytes:
    bits = int.from_bytes(content, "little")
    for _ in range(rnd.choice([1, 1, 2, 5])):
        bits ^= 1 << rnd.randrange(8 * len(content))
    return bits.to_bytes(len(content), "little")


def change_words(rnd: Random, content: bytes, saved: Saved) -> bytes:
    words = bytearray(content)
    for _ in range(rnd.choice([1, 1, 3])):
        value = rnd.choice([0, 1, 2**63, 2**64 - 1, rnd.randrange(700), rnd.getrandbits(64)])
        words[(at := 8 * rnd.randrange(len(content) // 8)) : at + 8] = value.to_bytes(8, "little")
    return bytes(words)


def change_the_head(rnd: Random, content: bytes, saved: Saved) -> bytes:
    """Other rows, worlds, moments, versions, layouts."""
    words = bytearray(content)
    for _ in range(rnd.choice([1, 2, 3])):
        value = rnd.choice([-1, 0, 1, 2, 3, 4, 2**31, -(2**63), 2**62, rnd.getrandbits(62)])
        struct.pack_into("<q", words, 8 * rnd.randrange(14), value)
    return bytes(words)


def change_the_contents(rnd: Random, content: bytes, saved: Saved) -> bytes:
    """Other bytes in the JSON, or JSON of another structure."""
    [size] = struct.unpack_from("<q", content, 8 * 13)
    text = bytearray(content[HEAD : HEAD + size])
    if rnd.random() < 0.5:
        text[rnd.randrange(size)] = rnd.choice(b'0123456789[]{}":,-.eEnulltrue \\\xff')
    else:
        tree = json.loads(text)
        generator = rnd.choice(tree["generators"])
        key = rnd.choice([*generator, "mesh"])
        value = rnd.choice(
            [None, -1, 0, 8, 2**70, 1e300, "x", "numpy", [], {}, True, generator["bytes"]]
        )
        (tree if key == "mesh" else generator)[key] = value
        text = bytearray(json.dumps(tree, separators=(",", ":")).encode()[:size].ljust(size))
    return content[:HEAD] + bytes(text) + content[HEAD + size :]


def mix(rnd: Random, content: bytes, saved: Saved) -> bytes:
    """Words of another rank's record or of another moment's, from some place to another."""
    other = saved.any(rnd)
    start, end = sorted(8 * rnd.randrange(len(content) // 8 + 1) for _ in range(2))
    return content[:start] + other[start:end] + content[end:]


def change_the_length(rnd: Random, content: bytes, saved: Saved) -> bytes:
    length = 8 * rnd.randrange(2 * len(content) // 8)
    return (content + saved.any(rnd))[:length]


def join(rnd: Random, content: bytes, saved: Saved) -> bytes:
    """Several records in one tensor, of any rows and moments, in any order."""
    return b"".join(saved.any(rnd) for _ in range(rnd.choice([2, 3, 4])))


def swap_states(rnd: Random, content: bytes, saved: Saved) -> bytes:
    record = Record.from_tensor(to_tensor(content))
    streams = dict(record.streams)
    first, second = rnd.sample(NAMES, 2)
    streams[first] = streams[first]._replace(state=streams[second].state)
    return to_bytes(replace(record, streams=streams))


def change_streams(rnd: Random, content: bytes, saved: Saved) -> bytes:
    """Generators that are missing, unknown, of another kind, per row or shared."""
    record = Record.from_tensor(to_tensor(content))
    streams = dict(record.streams)
    name = rnd.choice(NAMES)
    what = rnd.randrange(4)
    if what == 0:
        del streams[name]
    elif what == 1:
        streams["unknown"] = Stream("python", rnd.random() < 0.5, rnd.randbytes(16))
    elif what == 2:
        streams[name] = streams[name]._replace(kind=rnd.choice(["python", "numpy", "x"]))
    else:
        streams[name] = streams[name]._replace(shared=not streams[name].shared)
    return to_bytes(replace(record, streams=streams, mesh=rnd.choice([None, (("dp", 3),)])))


def leave(rnd: Random, content: bytes, saved: Saved) -> bytes:
    return content


DAMAGES = (
    *(flip_bits, change_words, change_the_head, change_the_contents, mix, change_the_length),
    *(join, swap_states, change_streams, leave),
)


def to_tensor(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.int64))


def live(rng: StatefulRNG) -> dict[str, bytes]:
    return {name: stream.state for name, stream in record_of(rng.state_dict()).streams.items()}


def draw_from_all(generators: dict[str, Any]) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.randn(1)
    torch.randn(1, generator=generators["noise"])
    generators["shuffle"].standard_normal()


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_or_mixed_record_is_refused_or_is_taken_bit_for_bit(
    part: int, fake_group: Callable[[int, int], None]
) -> None:
    # A job without a group has row 0 of 1; this one a row that 1 or 2 saved rows would fork into.
    if part % 2:
        fake_group(2, 3)
    rng, generators = create(5)
    saved = Saved(rng, lambda: draw_from_all(generators))
    row = record_of(rng.state_dict()).row
    good = {rows[row] for rows in saved.moments}
    draw_from_all(generators)
    before = live(rng)
    for index in cases(part, RECORDS):
        with case(index) as rnd, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = saved.any(rnd)
            bad = rnd.choice(DAMAGES)(rnd, content, saved)
            if rnd.random() < 0.5:
                bad = sealed(bad)
            before = assert_refused_or_taken(rng, row, bad, before, bad in good)


def assert_refused_or_taken(
    rng: StatefulRNG, row: int, content: bytes, before: dict[str, bytes], good: bool
) -> dict[str, bytes]:
    """Load it and return where the streams are then."""
    try:
        rng.load_state_dict({KEY: to_tensor(content)})
    except RNGStateError:
        after = live(rng)
        assert after == before, "refused, and yet streams moved"
        assert not good, "refused, and yet as it was written"
        return after
    after = live(rng)
    head, streams = read(content, row)
    assert row == head[3] if row < head[4] else row % head[4] == head[3], "another rank's row"
    for name, kind in KINDS.items():
        if name not in streams:
            assert after[name] == before[name], "absent, and yet moved"
            continue
        saved_kind, state = streams[name]
        assert saved_kind == kind
        if row == head[3] or name == "shuffle":
            assert after[name] == state, "not bit for bit"
        else:
            assert after[name] not in (state, before[name]), "not forked"
    return after


def read(content: bytes, row: int) -> tuple[list[int], dict[str, tuple[str, bytes]]]:
    """Return the head and the states of what was taken, read without the library."""
    head = list(struct.unpack_from("<14q", content))
    size = 8 * head[2]
    if 32 < size < len(content) and len(content) % size == 0:  # records one after the other
        parts = [content[at : at + size] for at in range(0, len(content), size)]
        rows = [int.from_bytes(part[24:32], "little", signed=True) for part in parts]
        place, source = row % len(parts), row % max(head[4], 1)
        if rows[place] != source and source in rows:
            place = rows.index(source)
        content = parts[place]
        head = list(struct.unpack_from("<14q", content))
    assert head[0] == 1
    assert content == sealed(content), "taken, and yet its check word does not fit"
    place, streams = HEAD + head[13] + -head[13] % 8, {}
    for generator in json.loads(content[HEAD : HEAD + head[13]])["generators"]:
        length = generator["bytes"]
        streams[str(generator["name"])] = generator["kind"], content[place : place + length]
        place += length + -length % 8
    assert place == len(content) - 8
    return head, streams


# Sequences of uses.


GLOBAL = ("python", "numpy", "torch")


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
        return numbers(self.streams[kind], count)

    def state(self) -> dict[str, Any]:
        found = {}
        for kind, stream in self.streams.items():
            if kind == "python":
                found[kind] = stream.getstate()
            elif kind == "shuffle":
                found[kind] = stream.bit_generator.state
            else:
                found[kind] = stream.get_state()
        return found

    def restore(self, state: dict[str, Any]) -> None:
        for kind, stream in self.streams.items():
            if kind == "python":
                stream.setstate(state[kind])
            elif kind == "shuffle":
                stream.bit_generator.state = state[kind]
            else:
                stream.set_state(state[kind])


def numbers(stream: Any, count: int) -> list[float]:
    """Draw normals: libraries draw them in pairs or blocks and keep what is left for later."""
    if isinstance(stream, torch.Generator):
        return [torch.randn(1, generator=stream).item() for _ in range(count)]
    if hasattr(stream, "standard_normal"):
        return [float(stream.standard_normal()) for _ in range(count)]
    return [stream.gauss(0, 1) for _ in range(count)]


class Uses:
    """Draws, saves, loads, loads that fail, scopes, reseeding and rewinds in any order."""

    def __init__(self, rnd: Random) -> None:
        self.rnd = rnd
        seed = rnd.getrandbits(32)
        self.rng, registered = create(seed)
        self.streams: dict[str, Any] = {
            "python": random,
            "numpy": np.random,
            "torch": torch.default_generator,
            **registered,
        }
        self.model = Model(seed)
        self.saves: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self.loaded: dict[str, Any] | None = None
        self.scopes: list[tuple[ScopedRNG, dict[str, Any]]] = []

    def step(self) -> None:
        uses = [self.draw, self.draw, self.save, self.reseed]
        if self.saves:
            uses += [self.load, self.load, self.load_damaged]
        if self.loaded:
            uses += [self.rewind]
        if len(self.scopes) < 3:
            uses += [self.enter]
        if self.scopes:
            uses += [self.leave]
        self.rnd.choice(uses)()

    def draw(self) -> None:
        name, count = self.rnd.choice(NAMES), self.rnd.choice([1, 2, 3, 15, 16, 17, 313])
        assert numbers(self.streams[name], count) == self.model.draw(name, count), name

    def save(self) -> None:
        state = self.model.state()
        if self.scopes:  # the global streams of the StatefulRNG come back when these end
            state |= {name: self.scopes[0][1][name] for name in GLOBAL}
        with unmoved():
            self.saves.append((self.rng.state_dict()[KEY], state))

    def load(self) -> None:
        table, state = self.rnd.choice(self.saves)
        self.rng.load_state_dict({KEY: table.clone()})
        self.restored(state)
        self.loaded = state

    def restored(self, state: dict[str, Any]) -> None:
        if self.scopes:
            here = self.model.state()
            self.scopes[0][1].update({name: state[name] for name in GLOBAL})
            state = {**state, **{name: here[name] for name in GLOBAL}}
        self.model.restore(state)

    def load_damaged(self) -> None:
        table = self.rnd.choice(self.saves)[0].clone()
        table[self.rnd.randrange(len(table))] ^= 1 << self.rnd.randrange(63)
        try:
            self.rng.load_state_dict({KEY: table})
        except RNGStateError as error:
            assert str(error).startswith("rng_streams: ")  # noqa: PT017
        else:
            raise AssertionError("a flipped bit was not seen")

    def rewind(self) -> None:
        assert self.loaded is not None
        self.rng.rewind()
        self.restored(self.loaded)

    def enter(self) -> None:
        seed = self.rnd.choice([None, self.rnd.getrandbits(32)])
        scope = ScopedRNG(seed)
        self.scopes.append((scope, self.model.state()))
        scope.__enter__()
        if seed is not None:
            self.model.reseed_globals(seed)

    def leave(self) -> None:
        scope, state = self.scopes.pop()
        scope.__exit__(None, None, None)
        # A scope is about the global streams; registered ones go on.
        here = self.model.state()
        self.model.restore({**state, "noise": here["noise"], "shuffle": here["shuffle"]})

    def reseed(self) -> None:
        seed = self.rnd.getrandbits(32)
        init_all_rng(seed)
        self.model.reseed_globals(seed)

    def end(self) -> None:
        for name, stream in self.streams.items():
            assert numbers(stream, 2) == self.model.draw(name, 2), name


@pytest.mark.parametrize("part", range(PARTS))
def test_any_sequence_of_uses_leaves_every_stream_where_the_model_has_it(part: int) -> None:
    for index in cases(part, SEQUENCES):
        with case(index) as rnd:
            uses = Uses(rnd)
            for _ in range(rnd.randrange(4, 13)):
                uses.step()
            uses.end()
