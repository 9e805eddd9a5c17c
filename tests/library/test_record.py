"""The record: what it is made of, byte by byte, and what becomes of it on a new row."""

import dataclasses
import hashlib
import json
import random
import struct

import numpy as np
import pytest
import torch

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.generators import Slot
from nemo_rng_dcp.record import KEY, Record, Stream, fingerprint
from nemo_rng_dcp.resume import Job, fork_seed, resume
from nemo_rng_dcp.table import records_in
from tests.support.altered import altered, record_of

RECORD = Record(
    row=3,
    rows=8,
    world_size=16,
    seed=42,
    ranked=True,
    resizes=2,
    taken_at=1_780_000_000_123_456_789,
    mesh=(("dp", 4), ("pp", 2)),
    streams={"python": Stream("python", False, b"12345"), "order": Stream("x", True, b"\xff" * 8)},
    python_version=3011007,
    numpy_version=2004006,
    torch_version=2013000,
    library_version=1000,
    hash_seed="random",
)
"""A record that never changes: what it is on disk is layout 1."""


def test_layout_1_byte_by_byte() -> None:
    contents = (
        b'{"generators":[{"name":"python","kind":"python","bytes":5,"shared":false},'
        b'{"name":"order","kind":"x","bytes":8,"shared":true}],'
        b'"mesh":[["dp",4],["pp",2]]' + 109 * b" " + b"}"
    )
    padding = bytes(-len(contents) % 8)
    body = contents + padding + b"12345\0\0\0" + b"\xff" * 8
    length = 14 + len(body) // 8 + 1
    # layout, library, length, row, rows, world size, seed, ranked, resizes, time, versions, bytes
    numbers = [1, 1000, length, 3, 8, 16, 42, 1, 2, 1_780_000_000_123_456_789]
    head = struct.pack("<14q", *numbers, 3011007, 2004006, 2013000, len(contents))
    check_word = hashlib.blake2b(head + body, digest_size=8).digest()
    tensor = RECORD.to_tensor()
    assert tensor.numpy().tobytes() == head + body + check_word
    assert (tensor.dtype, tensor.shape) == (torch.int64, (length,))
    assert Record.from_tensor(tensor) == RECORD


def test_a_record_is_read_with_numpy_and_json_alone() -> None:
    """As docs/format.md describes it, without this library."""
    rng = StatefulRNG(5)
    table = rng.state_dict()[KEY].numpy()
    expected = random.getstate()
    head = table[:14].tolist()
    contents = json.loads(table[14:].tobytes()[: head[13]])
    place = 14 + -(-head[13] // 8)
    states = {}
    for its in contents["generators"]:
        words = -(-its["bytes"] // 8)
        states[its["name"]] = table[place : place + words].tobytes()[: its["bytes"]]
        place += words
    assert (head[0], head[2], head[3:5], head[6]) == (1, len(table), [0, 1], 5)
    assert place == len(table) - 1
    assert (contents["mesh"], contents["generators"][0]["kind"]) == (None, "python")
    numbers = np.frombuffer(states["python"], dtype=np.uint32)
    assert (3, tuple(numbers[:625].tolist()), None) == expected
    assert states["torch"] == torch.get_rng_state().numpy().tobytes()


def test_every_bit_of_a_record_counts() -> None:
    tensor = RECORD.to_tensor()
    content = tensor.numpy().view(np.uint8)
    for index in range(len(content)):
        content[index] ^= 1 << index % 8
        with pytest.raises(RuntimeError, match="rng_streams: "):
            Record.from_tensor(tensor)
        content[index] ^= 1 << index % 8
    assert Record.from_tensor(tensor) == RECORD


def resealed(content: bytes) -> torch.Tensor:
    digest = hashlib.blake2b(content[:-8], digest_size=8).digest()
    return torch.from_numpy(np.frombuffer(bytearray(content[:-8] + digest), dtype=np.int64))


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (13 * 8, b"\xff\xff\0\0\0\0\0\0"),  # more contents than there are bytes
        (13 * 8, b"\x01\0\0\0\0\0\0\0"),  # less than the JSON
        (14 * 8, b"["),
        (14 * 8 + 2, b"nesh"),
        (RECORD.to_tensor().numpy().tobytes().index(b'"bytes":5') + 8, b"9"),
        (RECORD.to_tensor().numpy().tobytes().index(b'"bytes":8') + 8, b"0"),
        (RECORD.to_tensor().numpy().tobytes().index(b'["dp",4]') + 6, b'1e999],["pp",2]]'),
    ],
)
def test_contents_that_make_no_sense_are_refused(place: int, text: bytes) -> None:
    content = bytearray(RECORD.to_tensor().numpy().tobytes())
    content[place : place + len(text)] = text
    with pytest.raises(RuntimeError, match="rng_streams: a record's contents make no sense"):
        Record.from_tensor(resealed(bytes(content)))


def test_records_that_stand_in_one_tensor_are_told_apart() -> None:
    one = RECORD.to_tensor()
    rows = [altered({KEY: one}, row=row, rows=3)[KEY] for row in range(3)]
    assert [Record.from_tensor(each).row for each in records_in(torch.cat(rows))] == [0, 1, 2]
    assert len(records_in(one)) == 1  # row 3 of 8 alone
    assert len(records_in(torch.cat(rows[:2]))) == 1  # two of three: no table


def test_fork_seeds_are_64_bits_that_depend_on_all_they_are_made_from() -> None:
    seeds = {
        fork_seed(name, row, resizes, state)
        for name in ("python", "numpy")
        for row in (4, 5)
        for resizes in (1, 2)
        for state in (b"state", b"stata")
    }
    assert len(seeds) == 16
    many = [fork_seed("torch", row, 1, b"state") for row in range(200)]
    assert min(many) >= 0
    assert 2**63 < max(many) < 2**64, "the upper bits are used"
    # For ever: a job that grows from a checkpoint of today draws the same numbers tomorrow.
    assert fork_seed("python", 4, 1, b"state") == 3821221214801519556


def test_fingerprints_are_for_ever() -> None:
    assert fingerprint(b"state") == "1f7f89034ba8"


# The rules of a resume, without a load: generators that are forked, kept, absent, left over.


def job_of(row: int, rows: int, *, ranked: bool, mesh: tuple[tuple[str, int], ...] | None) -> Job:
    slots = {
        "python": Slot("python", False, True),
        "noise": Slot("torch.cpu", False, False),
        "order": Slot("numpy.PCG64", True, False),
    }
    return Job(row, rows, mesh, ranked, slots)


def saved(rows: int, *, ranked: bool, mesh: tuple[tuple[str, int], ...] | None) -> Record:
    streams = {
        "python": Stream("python", False, b"p"),
        "noise": Stream("torch.cpu", False, b"n"),
        "order": Stream("numpy.PCG64", True, b"o"),
    }
    return Record(0, rows, rows, 1, ranked, 3, 1, mesh, streams)


@pytest.mark.parametrize("ranked_then", [False, True])
@pytest.mark.parametrize("ranked_now", [False, True])
def test_on_a_new_row_globals_follow_ranked_and_registered_ones_do_not(
    ranked_then: bool, ranked_now: bool
) -> None:
    record = saved(2, ranked=ranked_then, mesh=None)
    its = resume(record, job_of(2, 4, ranked=ranked_now, mesh=None))
    forked = {"noise"} | ({"python"} if ranked_then or ranked_now else set())
    assert its.seeds.keys() == forked
    assert its.states == {"python": b"p", "noise": b"n", "order": b"o"}
    assert its.resizes == 4
    assert its.seeds["noise"] == fork_seed("noise", 2, 4, b"n")
    own = resume(record, job_of(0, 4, ranked=ranked_now, mesh=None))
    assert (own.states, own.seeds) == (its.states, {})


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (None, None, ""),
        ((("dp", 4),), (("dp", 4),), ""),
        ((("dp", 4), ("pp", 2)), (("dp", 2), ("pp", 4)), "along dp 4 x pp 2 and are loaded along"),
        ((("dp", 2), ("pp", 4)), (("pp", 4), ("dp", 2)), "loaded along pp 4 x dp 2: row r may bel"),
        (None, (("dp", 8),), "saved along all ranks and are loaded along dp 8"),
        ((("dp", 8),), None, "saved along dp 8 and are loaded along all ranks"),
    ],
)
def test_another_mesh_of_as_many_rows_is_said(then: object, now: object, said: str) -> None:
    rows = 4 if said == "" else 8
    record = saved(rows, ranked=True, mesh=then)  # type: ignore[arg-type]
    its = resume(record, job_of(0, rows, ranked=True, mesh=now))  # type: ignore[arg-type]
    assert said in " ".join(its.remarks)
    assert bool(its.remarks) == bool(said)


@pytest.mark.parametrize(
    ("then", "now", "rows", "is_global", "said"),
    [
        (False, True, 2, True, "saved with ranked=False, now ranked=True"),
        (True, False, 2, True, "saved with ranked=True, now ranked=False"),
        (True, True, 2, True, ""),
        (False, True, 1, True, ""),  # one row: it makes no difference
        (False, True, 2, False, ""),  # nor where no global stream is stored
    ],
)
def test_another_ranked_is_said(
    then: bool, now: bool, rows: int, is_global: bool, said: str
) -> None:
    job = job_of(0, rows, ranked=now, mesh=None)
    python = job.slots["python"]._replace(is_global=is_global)
    job = dataclasses.replace(job, slots={**job.slots, "python": python})
    its = resume(saved(rows, ranked=then, mesh=None), job)
    assert said in " ".join(its.remarks)
    assert bool(its.remarks) == bool(said)


@pytest.mark.parametrize(
    ("shared", "rows", "said"),
    [
        (True, 2, "noise was saved in generators=, now in shared_generators=: ranks that differed"),
        (False, 2, "order was saved in shared_generators=, now in generators=: ranks that drew al"),
        (True, 1, ""),  # one row: it makes no difference
    ],
)
def test_a_generator_that_is_shared_now_or_no_longer_is_said(
    shared: bool, rows: int, said: str
) -> None:
    job = job_of(0, rows, ranked=True, mesh=None)
    name = "noise" if shared else "order"
    moved = {name: job.slots[name]._replace(shared=shared)}
    job = dataclasses.replace(job, slots={**job.slots, **moved})
    its = resume(saved(rows, ranked=True, mesh=None), job)
    assert its.states.keys() == {"python", "noise", "order"}
    assert not its.seeds
    assert said in " ".join(its.remarks)
    assert len(its.remarks) == bool(said)


def test_one_dimension_that_grows_keeps_its_numbers_and_two_do_not() -> None:
    grown = resume(
        saved(2, ranked=True, mesh=(("dp", 2),)),
        job_of(0, 3, ranked=True, mesh=(("dp", 3),)),
    )
    assert len(grown.remarks) == 1
    assert "2 rows were saved and 3 are loaded: row 2 is new, row 2 from row 0" in grown.remarks[0]
    assert "(python, noise forked; order taken as saved)" in grown.remarks[0]
    two = resume(
        saved(4, ranked=True, mesh=(("pp", 2), ("dp", 2))),
        job_of(0, 8, ranked=True, mesh=(("pp", 2), ("dp", 4))),
    )
    assert "row r may belong to another coordinate now" in two.remarks[1]


def test_record_of_a_live_rng_is_what_resume_takes() -> None:
    rng = StatefulRNG(1)
    record = record_of(rng.state_dict())
    slots = {name: Slot(stream.kind, False, True) for name, stream in record.streams.items()}
    its = resume(record, Job(0, 1, None, False, slots))
    assert its.states.keys() == slots.keys()
    assert its.remarks == ()


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (3, 8, "row 8, expected 0 to 7"),
        (3, -1, "row -1, expected 0 to 7"),
        (4, 0, "rows 0, expected 1 to"),
        (5, -5, "world_size -5, expected 1 to"),
        (6, -7, "seed -7, expected 0 to 4294967295"),
        (6, 2**32, "seed 4294967296, expected 0 to 4294967295"),
        (7, 2, "ranked 2, expected 0 to 1"),
        (8, -3, "resizes -3, expected 0 to"),
        (8, 2**63 - 1, "resizes 9223372036854775807, expected 0 to"),
        (9, -(2**63), "taken_at -9223372036854775808, expected 0 to"),
        (10, -1, "python_version -1, expected 0 to"),
    ],
)
def test_a_head_out_of_range_is_refused_by_field(place: int, number: int, message: str) -> None:
    content = bytearray(RECORD.to_tensor().numpy().tobytes())
    content[8 * place : 8 * place + 8] = number.to_bytes(8, "little", signed=True)
    with pytest.raises(RuntimeError, match=f"^rng_streams: a record, .* says {message}"):
        Record.from_tensor(resealed(bytes(content)))
