"""Versions as numbers, and ``PYTHONHASHSEED``: warned of where a resume has another one."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nemo_rng_dcp.cli.reading.opening import open_tables
from nemo_rng_dcp.record import Mesh, Record
from nemo_rng_dcp.table import records_in
from nemo_rng_dcp.versions import HASH_SEED, UNSEEDED, version_number, version_text
from tests.fixtures import LAYOUT_1
from tests.library import hash_seed
from tests.support.command import Capture, ask, ask_json
from tests.support.launch import environment
from tests.support.records import RECORD, records, save

LONGEST = str(2**32 - 1)


OTHER = "0" if HASH_SEED != "0" else "1"
"""A hash seed that this process has not."""


class Started:
    """A process under the other hash seed; its start takes seconds, so the tests share it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, hash_seed.__file__],
            env=environment(PYTHONHASHSEED=OTHER),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: object) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin
        assert stdout
        print(json.dumps([*map(str, words)]), file=stdin, flush=True)
        return json.loads(stdout.readline())


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    started = Started()
    yield started
    with started.process:
        started.process.kill()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_resume_under_another_hash_seed_warns(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of strings tells that it matters."""
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # too late, as in the other process
    there, here = tmp_path / "there", tmp_path / "here"
    assert started.ask("save", there) != hash_seed.answer("save", here)
    assert hash_seed.answer("load", there, here) == [[another_hash_seed(OTHER, HASH_SEED)], []]
    back = [] if HASH_SEED == UNSEEDED else [another_hash_seed(HASH_SEED, OTHER)]
    assert started.ask("load", there, here) == [[], back]


def another_hash_seed(saved: str, now: str) -> str:
    return (
        f"RNG state: saved with PYTHONHASHSEED {saved}, now {now}: a set of strings is iterated in "
        f"another order. Start the job with PYTHONHASHSEED={saved}"
    )


def test_the_commands_own_hash_seed_is_not_the_jobs(started: Started, tmp_path: Path) -> None:
    states = {"python": random.getstate(), "numpy": np.random.get_state()}
    torch.save({**states, "cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    assert started.ask("import", tmp_path, tmp_path / "out") == 0
    [table] = open_tables(str(tmp_path / "out"))
    record = table.read(0)
    assert isinstance(record, Record)
    assert record.hash_seed == UNSEEDED


MESHES: list[Mesh | None] = [None, (("dp", 4), ("pp", 2)), (("a" * 94, 2),), (("a" * 95, 2),)]


@pytest.mark.parametrize("mesh", [*MESHES, (("a" * 120, 2),), (("a" * 121, 2),)])
def test_no_hash_seed_changes_the_length(mesh: Mesh | None) -> None:
    """Plain ``dcp.load`` takes no other length. What has no room is left out."""
    record = replace(RECORD, mesh=mesh)
    length = len(record.to_tensor())
    for seed in ("0", LONGEST, "x" * 1000):
        tensor = replace(record, hash_seed=seed).to_tensor()
        assert len(tensor) == length
        found = Record.from_tensor(tensor)
        assert found.mesh == mesh
        assert found.hash_seed in (seed, UNSEEDED)


@pytest.mark.parametrize("mesh", MESHES[:3])
def test_every_hash_seed_has_room_beside_a_mesh_of_some_dimensions(mesh: Mesh | None) -> None:
    record = replace(RECORD, mesh=mesh, hash_seed=LONGEST)
    assert Record.from_tensor(record.to_tensor()) == record


def test_a_hash_seed_stands_in_the_padding_of_the_mesh() -> None:
    content = replace(RECORD, hash_seed="7").to_tensor().numpy().tobytes()
    expected = b'"mesh":[["dp",4],["pp",2]],"hash_seed":"7"' + 93 * b" " + b"}"
    assert expected in content
    without = RECORD.to_tensor().numpy().tobytes()
    assert b"hash_seed" not in without, "as before there was such a field"


def test_records_from_before_the_field_have_no_hash_seed(tmp_path: Path) -> None:
    dcp_to_torch_save(LAYOUT_1, tmp_path / "file.pt")
    table = torch.load(tmp_path / "file.pt", weights_only=True)["app"]["rng"]["rng_streams"]
    assert [Record.from_tensor(row).hash_seed for row in records_in(table)] == [UNSEEDED] * 2


def test_a_record_has_the_hash_seed_of_its_process() -> None:
    record = Record(0, 1, 1, 1, False, 0, 1, None, {})
    assert record.hash_seed == HASH_SEED == (os.environ.get("PYTHONHASHSEED") or UNSEEDED)


def test_inspect_shows_the_hash_seed(tmp_path: Path, capsys: Capture) -> None:
    save(records(1, hash_seed="7"), tmp_path / "set")
    save(records(1, hash_seed=UNSEEDED), tmp_path / "unset")
    assert "PYTHONHASHSEED 7" in ask(capsys, "inspect", tmp_path / "set")[1]
    assert "PYTHONHASHSEED" not in ask(capsys, "inspect", tmp_path / "unset")[1]
    [entry] = ask_json(capsys, "inspect", tmp_path / "set")["entries"]
    assert [row["hash_seed"] for row in entry["streams"]] == ["7"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2.13.0+cpu", 2_013_000),
        ("3.11.7", 3_011_007),
        ("2.4", 2_004_000),
        ("2.15.0a0+git1234", 2_015_000),
        ("unknown", 0),
    ],
)
def test_versions_are_numbers(text: str, number: int) -> None:
    assert version_number(text) == number
    if number:
        assert version_text(number).startswith(text[:3])
