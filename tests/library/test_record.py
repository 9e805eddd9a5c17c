"""The record: what it is made of, byte by byte."""

import hashlib
import json
import random
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.record import KEY, Record, fingerprint
from nemo_rng_dcp.table import records_in
from tests.support.records import RECORD, altered


def test_layout_1_byte_by_byte() -> None:
    contents = (
        b'{"generators":[{"name":"python","kind":"python","bytes":5,"shared":false},'
        b'{"name":"order","kind":"x","bytes":8,"shared":true }],'
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


@pytest.mark.parametrize(
    "change",
    [
        {"taken_at": 0},
        {"unread": True},
        {"hash_seed": "7", "parts": (("dp", 4), ("pp", 2))},
        {"row": 0, "rows": 1, "ranked": False, "mesh": None},
    ],
)
def test_what_was_written_is_read(change: dict[str, Any]) -> None:
    record = replace(RECORD, **change)
    assert Record.from_tensor(record.to_tensor()) == record


def test_no_seed_is_a_number_that_no_job_had() -> None:
    tensor = replace(RECORD, seed=None).to_tensor()
    assert tensor[6] == -1
    assert Record.from_tensor(tensor).seed is None


def test_a_record_is_read_with_numpy_and_json_alone() -> None:
    """As docs/format.md describes it, without this library."""
    rng = StatefulRNG(5)
    table = rng.state_dict()[KEY].numpy()
    expected = random.getstate()
    head = table[:14].tolist()
    contents = json.loads(table[14:].tobytes()[: head[13]])
    place = 14 + -(-head[13] // 8)
    states = {}
    for generator in contents["generators"]:
        words = -(-generator["bytes"] // 8)
        states[generator["name"]] = table[place : place + words].tobytes()[: generator["bytes"]]
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
    check_word = hashlib.blake2b(content[:-8], digest_size=8).digest()
    return torch.from_numpy(np.frombuffer(bytearray(content[:-8] + check_word), dtype=np.int64))


CONTENT = RECORD.to_tensor().numpy().tobytes()


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2, "a record of 2 numbers does not fit its check word"),
        (4, "a record of 4 numbers does not fit its check word"),
        (14, "a record of 14 numbers, by its head row 3 of 8, does not fit its check word"),
        (15, "a record's contents make no sense"),
    ],
)
def test_a_record_without_contents_is_refused_whatever_its_check_word(
    length: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^rng_streams: {message}"):
        Record.from_tensor(resealed(CONTENT[: 8 * length]))


@pytest.mark.parametrize(
    ("place", "text", "message"),
    [
        (13 * 8, b"\xff\xff\0\0\0\0\0\0", ""),  # more contents than there are bytes
        (13 * 8, b"\x01\0\0\0\0\0\0\0", ""),  # less than the JSON
        (14 * 8, b"[", ""),
        (14 * 8 + 2, b"nesh", ""),
        (CONTENT.index(b'"bytes":5') + 8, b"9", "392 bytes, of which 400 are described"),
        (CONTENT.index(b'"bytes":8') + 8, b"0", "392 bytes, of which 384 are described"),
        (CONTENT.index(b'["dp",4]') + 6, b'1e999],["pp",2]]', ""),
    ],
)
def test_contents_that_make_no_sense_are_refused(place: int, text: bytes, message: str) -> None:
    content = bytearray(CONTENT)
    content[place : place + len(text)] = text
    said = f"rng_streams: a record's contents make no sense: .*{message}"
    with pytest.raises(RuntimeError, match=said):
        Record.from_tensor(resealed(bytes(content)))


def test_the_only_row_is_row_0() -> None:
    with pytest.raises(RuntimeError, match=r"says row 1, expected 0 to 0\."):
        Record.from_tensor(replace(RECORD, row=1, rows=1).to_tensor())


def test_records_that_stand_in_one_tensor_are_told_apart() -> None:
    one = RECORD.to_tensor()
    rows = [altered({KEY: one}, row=row, rows=3)[KEY] for row in range(3)]
    assert [Record.from_tensor(row).row for row in records_in(torch.cat(rows))] == [0, 1, 2]
    assert len(records_in(one)) == 1  # row 3 of 8 alone
    assert len(records_in(torch.cat(rows[:2]))) == 2  # two of three, as a process may have


def test_fingerprints_never_change() -> None:
    assert fingerprint(b"state") == "1f7f89034ba8"


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (3, 8, "row 8, expected 0 to 7"),
        (3, -1, "row -1, expected 0 to 7"),
        (4, 0, "rows 0, expected 1 to"),
        (5, -5, "world_size -5, expected 1 to"),
        (6, -7, "seed -7, expected -1 to 4294967295"),
        (6, 2**32, "seed 4294967296, expected -1 to 4294967295"),
        (7, 2, "ranked 2, expected 0 to 1"),
        (8, -3, "resizes -3, expected 0 to"),
        (8, 2**63 - 1, "resizes 9223372036854775807, expected 0 to"),
        (9, -(2**63), "taken_at -9223372036854775808, expected 0 to"),
        (10, -1, "python_version -1, expected 0 to"),
    ],
)
def test_a_head_out_of_range_is_refused_by_field(place: int, number: int, message: str) -> None:
    content = bytearray(CONTENT)
    content[8 * place : 8 * place + 8] = number.to_bytes(8, "little", signed=True)
    with pytest.raises(RuntimeError, match=f"^rng_streams: a record, .* says {message}"):
        Record.from_tensor(resealed(bytes(content)))
