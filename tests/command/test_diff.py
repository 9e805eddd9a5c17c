"""``diff``: which streams of two checkpoints differ, and by how many draws."""

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.streams import distance
from nemo_rng_dcp.generators import GeneratorAdapter
from nemo_rng_dcp.generators.numpy_random import NumPyAdapter, NumPyGeneratorAdapter
from nemo_rng_dcp.generators.python_random import PythonAdapter
from nemo_rng_dcp.generators.torch_random import TorchAdapter
from nemo_rng_dcp.record import Stream
from tests.support.command import Capture, ask, ask_json
from tests.support.jobs import job
from tests.support.records import change_metadata, drawn_streams, records, save
from tests.support.streams import draw

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_equal_checkpoints(tmp_path: Path, capsys: Capture) -> None:
    a = save(records(50), tmp_path / "a")
    assert ask(capsys, "diff", a, a) == (0, "rng: 50 rows compared, no stream differs")


def test_streams_that_differ_are_listed(tmp_path: Path, capsys: Capture) -> None:
    a = save(records(50), tmp_path / "a")
    b = save(records(50, lambda row: drawn_streams(row + (row == 7))), tmp_path / "b")
    code, text = ask(capsys, "diff", a, b)
    assert code == 1
    assert "rng: 1 of 50 rows differ: python in 1, numpy in 1, torch in 1" in text
    assert re.search(r"B is 7 python \w{12} \w{12} another stream, or far off 7 numpy", text)
    (entry,) = ask_json(capsys, "diff", a, b)["entries"]
    assert [(stream["row"], stream["generator"]) for stream in entry["differences"]] == [
        (7, "python"),
        (7, "numpy"),
        (7, "torch"),
    ]
    (entry,) = ask_json(capsys, "diff", a, b, "--rows", "8-50")["entries"]
    assert entry["differences"] == []


def test_a_registered_generator_that_never_moved_is_told(tmp_path: Path, capsys: Capture) -> None:
    """The job draws from a copy of it: the record holds a stream that nobody uses."""
    noise = np.random.default_rng(1)
    rng = StatefulRNG(1, generators={"noise": noise})
    for step in "ab":
        rng.save(tmp_path / step)
        draw()
    words = "diff", tmp_path / "a", tmp_path / "b"
    text = "noise did not move in any row, and other streams did: does the job draw from the"
    assert text in ask(capsys, *words)[1]
    noise.random()
    rng.save(tmp_path / "c")
    assert "did not move" not in ask(capsys, "diff", tmp_path / "b", tmp_path / "c")[1]
    assert "did not move" not in ask(capsys, "diff", tmp_path / "b", tmp_path / "b")[1]


def test_other_jobs_and_other_entries(tmp_path: Path, capsys: Capture) -> None:
    a = save(records(50), tmp_path / "a")
    fewer = save(records(3, seed=9), tmp_path / "fewer")
    code, text = ask(capsys, "diff", a, fewer)
    assert (code, "rng: seed 42 in A, 9 in B" in text) == (1, True)
    assert "rng: rows 50 in A, 3 in B" in text
    assert "47 of 50 rows differ" in text
    assert re.search(r"B is 3 python \w{12} - only in A", text)
    _, text = ask(capsys, "diff", fewer, a)
    assert re.search(r"B is 3 python - \w{12} only in B", text)
    assert ask(capsys, "diff", a, tmp_path)[0] == 2


def test_single_entries_are_compared_whatever_their_paths(tmp_path: Path, capsys: Capture) -> None:
    a = save(records(3), tmp_path / "a")
    b = save(records(3), tmp_path / "b", "")
    assert ask(capsys, "diff", a, b) == (
        0,
        "rng: key rng in A, (top level) in B rng: 3 rows compared, no stream differs",
    )


def test_of_several_entries_equal_paths_are_compared(tmp_path: Path, capsys: Capture) -> None:
    one = records(1)[0].to_tensor()
    for name, paths in (("a", "xy"), ("b", "yz")):
        state = {path: {"rng_streams": one} for path in paths}
        dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
    code, text = ask(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (code, "x: only in A" in text, "z: only in B" in text) == (1, True, True)
    assert "y: 1 row compared, no stream differs" in text


def test_what_else_differs_is_remarked(tmp_path: Path, capsys: Capture) -> None:
    mesh = (("dp", 1), ("tp", 1))
    a = save(records(1, hash_seed="3", library_version=2000), tmp_path / "a")
    b = save(records(1, mesh=mesh, library_version=3000), tmp_path / "b")
    code, text = ask(capsys, "diff", a, b)
    assert code == 0
    for remark in ("PYTHONHASHSEED 3 in A, ", "nemo_rng_dcp 0.2.0 in A, 0.3.0 in B"):
        assert f"rng: {remark}" in text
    assert "rng: mesh all ranks in A, dp 1 x tp 1 in B" in text


def claim_one_row(metadata: Any) -> None:
    """Leave two chunks, and say that they are one row."""
    (table,) = metadata.state_dict_metadata.values()
    table.size = table.chunks[0].sizes


def lose_row_1(metadata: Any) -> None:
    (table,) = metadata.state_dict_metadata.values()
    del table.chunks[1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (claim_one_row, "rng: no row compared nemo-rng-dcp: 2 rows of A and 2 rows of B missing"),
        (lose_row_1, "rng: 1 row compared, no stream differs nemo-rng-dcp: 1 row of A and 1 row"),
    ],
)
def test_rows_that_are_not_there_are_counted_once(
    damage: Any, reason: str, tmp_path: Path, capsys: Capture
) -> None:
    """A table without a good row was found to be the same as itself."""
    path = save(records(2), tmp_path)
    change_metadata(path, damage)
    code, text = ask(capsys, "diff", path, path)
    assert (code, reason in text) == (2, True), text


def test_a_row_that_one_side_has_lost_is_counted_once(tmp_path: Path, capsys: Capture) -> None:
    a, b = save(records(3), tmp_path / "a"), save(records(3), tmp_path / "b")
    change_metadata(b, lose_row_1)
    code, text = ask(capsys, "diff", a, b)
    assert (code, "2 rows compared" in text, "1 row of B missing" in text) == (2, True, True)


def run_twice(path: Path, more: int) -> None:
    rng = StatefulRNG(42, ranked=True)
    draw()
    if dist.get_rank() == 2:
        np.random.randint(2**32, size=more, dtype=np.uint32)
    dcp.save({"rng": rng}, checkpoint_id=path)


def test_the_first_stream_that_left_is_named(tmp_path: Path, capsys: Capture) -> None:
    """Of two runs at one step, one rank of B has drawn two words of NumPy's more."""
    job(3, run_twice, tmp_path / "a", 0)
    job(3, run_twice, tmp_path / "b", 2)
    code, text = ask(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert "rng: 1 of 3 rows differ: numpy in 1 row generator A B B is 2 numpy" in text
    assert text.endswith("2 words ahead")
    _, text = ask(capsys, "diff", tmp_path / "b", tmp_path / "a")
    assert text.endswith("2 words behind")


def drawn(name: str, words: int) -> Stream:
    """Return the state of a generator after some words."""
    adapter: GeneratorAdapter
    if name == "python":
        python = random.Random(1)
        for _ in range(words):
            python.getrandbits(32)
        adapter = PythonAdapter(python)
    elif name == "numpy":
        legacy = np.random.RandomState(1)
        legacy.randint(2**32, size=words, dtype=np.uint32)
        adapter = NumPyAdapter(legacy)
    elif name == "torch":
        generator = torch.Generator().manual_seed(1)
        torch.empty(words, dtype=torch.int64).random_(0, 2**28 - 1, generator=generator)
        adapter = TorchAdapter(generator)
    else:
        new = np.random.Generator(np.random.MT19937(1))
        new.integers(2**32, size=words, dtype=np.uint32)
        adapter = NumPyGeneratorAdapter(new)
    return Stream(adapter.kind, False, adapter.pack(adapter.get()))


@pytest.mark.parametrize("name", ["python", "numpy", "torch", "numpy.random.Generator"])
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (0, 1, "1 word ahead"),
        (3, 5, "2 words ahead"),
        (5, 3, "2 words behind"),
        (623, 625, "2 words ahead"),
        (1, 1248, "1,247 words ahead"),
        (1500, 300, "1,200 words behind"),
        (1, 5000, None),
    ],
)
def test_the_distance_is_counted_across_blocks(
    name: str, a: int, b: int, expected: str | None
) -> None:
    assert distance(drawn(name, a), drawn(name, b)) == expected


def test_other_streams_have_no_distance() -> None:
    python, legacy = drawn("python", 3), drawn("numpy", 3)
    assert distance(python, legacy) is None, "another kind"
    other = Stream("torch.cuda", False, bytes(16))
    assert distance(other, other) is None, "no MT19937"
    assert distance(python, python._replace(state=b"short")) is None


def with_gauss(row: int) -> Mapping[str, Stream]:
    generator = np.random.RandomState(row)
    generator.standard_normal(2)
    state = generator.get_state(legacy=False)
    state["has_gauss"], state["gauss"] = 1, 0.5
    generator.set_state(state)
    adapter = NumPyAdapter(generator)
    return {"numpy": Stream("numpy", False, adapter.pack(adapter.get()))}


def without_gauss(row: int) -> Mapping[str, Stream]:
    state = bytearray(with_gauss(row)["numpy"].state)
    state[-12:] = bytes(12)
    return {"numpy": Stream("numpy", False, bytes(state))}


def test_a_cached_normal_alone_is_told(tmp_path: Path, capsys: Capture) -> None:
    a, b = (
        save(records(1, with_gauss), tmp_path / "a"),
        save(records(1, without_gauss), tmp_path / "b"),
    )
    _, text = ask(capsys, "diff", a, b)
    assert text.endswith("another cached normal")
