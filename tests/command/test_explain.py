"""The rules of ``explain``, one by one; tests/fuzz/test_explain.py has random jobs."""

import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.main import main
from nemo_rng_dcp.grids import Grid
from nemo_rng_dcp.table import Rows
from tests.support.command import Capture, ask, ask_json
from tests.support.jobs import job
from tests.support.records import change_metadata, records, save
from tests.support.streams import draw, warned

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_many_fates_are_summarised(tmp_path: Path, capsys: Capture) -> None:
    path = save(records(300), tmp_path)
    code, text = ask(capsys, "explain", path, "--world-size", 400)
    assert code == 0
    assert "rows 0-299: continued rows 300-399: forked" in text
    _, text = ask(capsys, "explain", path, "--world-size", 400, "--rows", "299-300")
    assert re.search(r"299 299 continued .* 300 300 forked, from 0 ", text)


def test_a_summary_has_a_line_for_each_fate(tmp_path: Path, capsys: Capture) -> None:
    """A line for each new row was printed: 3,000 of them."""
    code = main(["explain", str(save(records(1), tmp_path / "one")), "--world-size", "3000"])
    lines = capsys.readouterr().out.splitlines()
    assert (code, len(lines) < 12) == (0, True)
    assert lines[4:6] == ["  row 0: continued", "  rows 1-2999: forked"]
    damaged = save([records(2)[0]] * 2, tmp_path / "damaged")
    code, text = ask(capsys, "explain", damaged, "--world-size", 101)
    assert (code, len(text) < 2000) == (1, True)
    assert "row 0: continued rows 1, 3, 5, 7, 9, ... (50 in all): refused" in text
    assert "rows 2, 4, 6, 8, 10, ... (50 in all): forked" in text


def test_the_rules_are_those_of_a_load(tmp_path: Path, capsys: Capture) -> None:
    alike = save(records(4, ranked=False), tmp_path)
    code, text = ask(capsys, "explain", alike, "--world-size", 5)
    assert (code, "copied, from 0" in text) == (0, True)
    assert "forked, from 0" in ask(capsys, "explain", alike, "--world-size", 5, "--ranked")[1]
    text = ask(capsys, "explain", alike, "--world-size", 4)[1]
    assert "with plain dcp.load" in text
    text = ask(capsys, "explain", alike, "--world-size", 4, "--generators", "numpy,cuda")[1]
    assert "the checkpoint has no cuda: the stream stays as it is" in text
    assert "the checkpoint has python, torch, which this job does not have: ignored" in text
    assert "planner=RNGLoadPlanner()" in text


MESH = ["--mesh", "dp=2,tp=2"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (["--mesh", "dp=3"], "a mesh of dp 3 has 3 ranks, not 4"),
        (["--along", "dp"], "--along names dimensions of a mesh: give --mesh too"),
        ([*MESH, "--along", "pp"], "--along pp: expected dimensions once and in"),
        ([*MESH, "--along", "tp,dp"], "once and in the mesh's order, dp,tp"),
        ([*MESH, "--along", "dp,dp"], "once and in the mesh's order, dp,tp"),
        ([*MESH, "--along", ""], "once and in the mesh's order, dp,tp"),
        (["--shared", "noize"], "--shared noize: expected names of python, numpy, torch, and"),
        (["--generators", "python,noise", "--shared", "noize"], "of python, noise, and"),
        (["--shared", "torch"], "and global ones are never shared"),
    ],
)
def test_a_job_that_cannot_exist_is_refused(
    bad: list[str], reason: str, tmp_path: Path, capsys: Capture
) -> None:
    path = save(records(1), tmp_path)
    code, text = ask(capsys, "explain", path, "--world-size", 4, *bad)
    assert (code, reason in text) == (2, True), text


@pytest.mark.parametrize("size", range(1, 9))
def test_a_generator_moves_to_the_shared_ones_with_plain_dcp_load(
    size: int, tmp_path: Path, capsys: Capture
) -> None:
    """Its flag was a byte shorter then, and so for one length of a name in eight the record."""
    name = "g" * size
    rng = StatefulRNG(seed=1, generators={name: random.Random(1)})
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    words = ["explain", tmp_path, "--world-size", 1, "--shared", name]
    assert not ask_json(capsys, *words)["entries"][0]["needs_planner"]
    shared = StatefulRNG(seed=1, shared_generators={name: random.Random(2)})
    dcp.load({"rng": shared}, checkpoint_id=tmp_path)
    assert shared.fingerprint() == rng.fingerprint()


def test_records_of_another_length_need_the_planner(tmp_path: Path, capsys: Capture) -> None:
    long = tuple((f"dimension_{number}_of_many", 1) for number in range(9))
    path = save(records(2, mesh=(*long, ("dp", 2))), tmp_path)
    words = ["explain", path, "--world-size", 2, "--mesh"]
    mesh = ",".join(f"{name}={size}" for name, size in (*long, ("dp", 2)))
    assert "with plain dcp.load" in ask(capsys, *words, mesh)[1]
    text = ask(capsys, *words, "dp=2")[1]
    assert "On 2 ranks, 2 rows, with planner=RNGLoadPlanner()" in text


def save_three(path: Path) -> None:
    """Save streams of three kinds, as the page on trackers does."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row = Rows.current(mesh["tp"], Grid.of(mesh["tp"])).row
    extra = {"mine": random.Random(row)}
    state = {
        "a": StatefulRNG(seed=1, ranked=True, mesh=mesh["dp"]),
        "b": StatefulRNG(seed=1, mesh=mesh["tp"], generators=extra, global_generators=False),
        "c": StatefulRNG(seed=1, ranked=True, global_generators=False, shared_generators=extra),
    }
    dcp.save(state, checkpoint_id=path)


def test_entries_of_several_meshes_are_explained_along_their_own(
    tmp_path: Path, capsys: Capture
) -> None:
    job(4, save_three, tmp_path)
    words = ["explain", tmp_path, "--world-size", 4, *MESH]
    for entry in ask_json(capsys, *words)["entries"]:
        rows = 4 if entry["key"] == "c" else 2
        assert (entry["rows"], entry["needs_planner"], entry["remarks"]) == (rows, False, [])
        assert {fate["fate"] for fate in entry["fates"]} == {"continued"}
    for option in (
        *(["--along", "dp"], ["--logical-ranks", "4"], ["--ranked"]),
        *(["--generators", "python"], ["--shared", ""]),
    ):
        code, text = ask(capsys, *words, *option)
        reason = f"{option[0]} is about one entry, and the checkpoint has a, b, c: give --entry too"
        assert (code, reason in text) == (2, True)
    (entry,) = ask_json(capsys, *words, "--entry", "b", "--along", "dp,tp")["entries"]
    assert (entry["key"], entry["rows"], entry["rows_saved"]) == ("b", 4, 2)
    code, text = ask(capsys, *words, "--entry", "d")
    assert (code, "--entry d: the checkpoint has only a, b, c" in text) == (2, True)


def save_logical(path: Path, logical_ranks: int | None = 8) -> None:
    rng = StatefulRNG(42, ranked=True, logical_ranks=logical_ranks)
    for rank in rng.ranks:
        with rng.as_rank(rank):
            draw(rank + 1)
    dcp.save({"rng": rng}, checkpoint_id=path)


def load_logical(path: Path) -> dict[int, dict[str, str]]:
    rng = StatefulRNG(42, ranked=True, logical_ranks=8)
    assert warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path)) == []
    found = {}
    for rank in rng.ranks:
        with rng.as_rank(rank):
            found[rank] = rng.fingerprint()
    return found


@pytest.mark.parametrize("saved_by", [8, 4, 1])
def test_logical_ranks_are_explained_as_they_are_loaded(
    saved_by: int, tmp_path: Path, capsys: Capture
) -> None:
    job(saved_by, save_logical, tmp_path)
    words = ["explain", tmp_path, "--world-size", 2]
    assert "8 rows were saved and 2 are loaded: rows 2 to 7 are dropped" in ask(capsys, *words)[1]
    words += ["--logical-ranks", 8]
    code, text = ask(capsys, *words)
    assert (code, "On 2 ranks, 8 rows, with plain dcp.load" in text) == (0, True)
    assert "rank 0 plays 0 to 3, rank 1 plays 4 to 7, every stream continues" in text
    (entry,) = ask_json(capsys, *words)["entries"]
    foretold = {fate["row"]: fate["fingerprints"] for fate in entry["fates"]}
    first, second = job(2, load_logical, tmp_path)
    assert {**first, **second} == foretold
    assert [fate["ranks"] for fate in entry["fates"]] == [[0]] * 4 + [[1]] * 4
    words = ["explain", tmp_path, "--world-size", 4, "--logical-ranks"]
    assert "every stream continues" not in ask(capsys, *words, 16)[1]
    code, text = ask(capsys, *words, 6)
    assert (code, "--logical-ranks 6 is no multiple of 4 rows" in text) == (2, True)
    mesh = ["--mesh", "dp=2,tp=2", "--along", "dp"]
    text = ask(capsys, *words, 8, *mesh)[1]
    assert "rank 0 plays 0 to 3, rank 1 plays 0 to 3, rank 2 plays 4 to 7" in text


def test_a_large_job_is_explained_soon(tmp_path: Path, capsys: Capture) -> None:
    """A fingerprint was made of each row that is not listed, and each saved row read 16 times."""
    path = save(records(1024), tmp_path)
    started = time.process_time()
    code, text = ask(capsys, "explain", path, "--world-size", 16384)
    assert time.process_time() - started < 4
    assert (code, "rows 1024-16383: forked" in text) == (0, True)
    _, listed = ask(capsys, "explain", path, "--world-size", 16384, "--rows", "16383")
    assert re.search(r"16383 16383 forked, from 1023 \w{12} ", listed)


def test_torch_has_no_such_meshes() -> None:
    """The control of two of these."""
    assert job(4, slice_meshes) == [[True, True, False]] * 4


def slice_meshes() -> list[bool]:
    """Return which of some slices torch refuses."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    refused = []
    for names in (("tp", "dp"), ("dp", "dp"), ("dp", "tp")):
        try:
            mesh[names]
            refused.append(False)
        except (KeyError, RuntimeError):
            refused.append(True)
    return refused


def test_rows_that_are_only_claimed_cost_nothing(tmp_path: Path, capsys: Capture) -> None:
    """An entry was built for every row that .metadata claims."""
    path = save(records(2), tmp_path)

    def enlarge(metadata: Any) -> None:
        (table,) = metadata.state_dict_metadata.values()
        table.size = torch.Size([2**60 * table.chunks[0].sizes[0] // 2**12])

    change_metadata(path, enlarge)
    code, text = ask(capsys, "explain", path, "--world-size", 2)
    assert (code, "a load raises" in text) == (1, True)
    code, text = ask(capsys, "inspect", path)
    assert code == 1
    assert re.search(r"\d{12,} of \d{12,} rows are missing, the first is 2", text)
