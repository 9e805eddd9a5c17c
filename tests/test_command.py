"""The command as a person uses it, on checkpoints that real ranks wrote."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conftest import Launches
from nemo_rng_dcp import __main__ as command
from nemo_rng_dcp.tools import terminal
from nemo_rng_dcp.tools.findings import private_generators
from ranks import command as jobs
from ranks.harness import checks_of
from streams import unmoved
from tables import States, change_metadata, drawn_states, rows_of, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

INSTALLED = str(Path(sys.executable).with_name("nemo-rng-dcp"))
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("check", checks_of(jobs))
def test_real_ranks_saved_and_resumed(check: str, launches: Launches) -> None:
    launches.assert_passed(jobs, check, 6)


@pytest.fixture(scope="session")
def saved(launches: Launches) -> Path:
    """The folder in which real ranks have left their checkpoints."""
    for check in checks_of(jobs):
        launches.assert_passed(jobs, check, 6)
    return launches.folder / "command-6"


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    words = [INSTALLED, *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=100, check=False, **options
    )


def ask(capsys: Capture, *arguments: object) -> tuple[int, str]:
    """Run the command in this process, which takes no seconds to start and moves no stream."""
    with unmoved():
        code = command.main([*map(str, arguments)])
    out, error = capsys.readouterr()
    assert max(map(len, out.splitlines()), default=0) <= 80, out
    return code, out + error


def ask_json(capsys: Capture, *arguments: object) -> Any:
    with unmoved():
        code = command.main([*map(str, arguments), "--json"])
    assert code in (0, 1)
    return json.loads(capsys.readouterr().out)


# As installed.


def test_inspect_of_4_ranks(saved: Path, tmp_path: Path) -> None:
    done = run("inspect", saved / "4_ranks_save", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "trainer.app.rng: 4 rows of 4 ranks, seed 42, ranked, layout 1" in done.stdout
    assert f"torch {torch.__version__.split('+')[0]}" in done.stdout
    expected = json.loads((saved / "4_ranks_save" / "streams.json").read_text())
    for row, streams in enumerate(expected):
        assert f"  {row}  {'  '.join(streams[g] for g in ('python', 'numpy', 'torch'))}\n" in (
            done.stdout
        ), "fingerprint(gather=True) and inspect do not show the same digits"
    assert done.stdout.endswith("no findings\n")
    assert not list(tmp_path.iterdir())


def test_as_a_module_with_json(saved: Path) -> None:
    words = [sys.executable, "-m", "nemo_rng_dcp", "inspect", str(saved / "1_rank_saves"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    (entry,) = json.loads(done.stdout)["entries"]
    assert (entry["key"], entry["rows"], len(entry["streams"])) == ("rng", 1, 1)
    assert entry["streams"][0]["origin"]["world_size"] == 1


def test_a_reason_is_one_line_on_stderr(tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no .metadata in it, nothing" in done.stderr


def test_colour_is_for_terminals(saved: Path) -> None:
    """On a real terminal, and not on one whose owner has set NO_COLOR."""

    def shown(**variables: str) -> str:
        ours, theirs = pty.openpty()
        environment = {"TERM": "xterm", **os.environ, **variables}
        words = [INSTALLED, "inspect", str(saved / "1_rank_saves")]
        subprocess.run(words, stdout=theirs, env=environment, timeout=100, check=True)
        text = os.read(ours, 2**16).decode()
        os.close(ours)
        os.close(theirs)
        return text

    assert "\033[" in shown(NO_COLOR="")
    assert "\033[" not in shown(NO_COLOR="1")


# What is found.


@pytest.mark.parametrize("name", ["1_rank_saves", "4_ranks_save"])
def test_good_streams_are_clean(name: str, saved: Path, capsys: Capture) -> None:
    assert ask(capsys, "inspect", saved / name)[0] == 0


def test_streams_that_were_never_ranked_may_be_alike(saved: Path, capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", saved / "4_ranks_that_are_not_ranked_save")
    assert (code, "not ranked" in text) == (0, True)


def shared(row: int) -> States:
    return {**drawn_states(row), "numpy": drawn_states(min(row, 1))["numpy"]}


def at_their_seed(row: int) -> States:
    states = {}
    for name, generator in private_generators().items():
        generator.seed(42 + row)
        states[name] = generator.read()
    return {**drawn_states(row), "python": states["python"]} if row else states


def test_rows_that_share_a_stream(tmp_path: Path, capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", save(rows_of(4, shared), tmp_path))
    assert code == 1
    assert re.search(r"finding: rng, numpy, rows 1-3: these rows share one stream", text)
    assert text.count("finding") == 1
    assert "although ranked" in text
    not_ranked = save(rows_of(4, shared, ranked=False), tmp_path / "not ranked")
    assert ask(capsys, "inspect", not_ranked)[0] == 0


def with_noise(row: int) -> States:
    return {**drawn_states(row), "noise": torch.tensor([1, 2])}


def test_registered_generators_are_not_said_to_be_ranked(tmp_path: Path, capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", save(rows_of(2, with_noise), tmp_path))
    assert code == 1
    assert "noise, rows 0-1: these rows share one stream" in text
    assert "does not seed what is registered" in " ".join(text.split())


def test_a_matrix_deeper_down_is_no_table(tmp_path: Path, capsys: Capture) -> None:
    tables = rows_of(2)
    path = save({**tables, "sub": {"z": torch.zeros(2, 5, dtype=torch.int64)}}, tmp_path)
    assert ask_json(capsys, "inspect", path)["entries"][0]["generators"] == [
        "python",
        "numpy",
        "torch",
    ]
    for words in (["inspect"], ["diff", path], ["explain", "--world-size", 2]):
        assert ask(capsys, *words, path)[0] == 0


def out_of_range(row: int) -> States:
    states = drawn_states(row)
    states["numpy"][3] = 2**32 if row == 1 else 5
    return states


def test_a_row_that_a_load_refuses_is_found_although_its_check_word_fits(
    tmp_path: Path, capsys: Capture
) -> None:
    path = save(rows_of(3, out_of_range), tmp_path)
    code, text = ask(capsys, "inspect", path)
    assert (code, "numpy, row 1: a load refuses it: a word is 4294967296" in text) == (1, True)
    code, text = ask(capsys, "explain", path, "--world-size", 3)
    assert (code, "for row 1 is missing or damaged" in " ".join(text.split())) == (1, True)


@pytest.mark.parametrize("where", ["key", "file"])
def test_control_codes_do_not_reach_the_terminal(
    where: str, tmp_path: Path, capsys: Capture
) -> None:
    evil = "\033[31mrng"
    path = save(rows_of(2), tmp_path, key=evil if where == "key" else "rng")
    if where == "file":

        def rename(metadata: Any) -> None:
            for place in metadata.storage_data.values():
                place.relative_path = evil

        change_metadata(path, rename)
    for words in (["inspect"], ["diff", path], ["explain", "--world-size", 2]):
        code, text = ask(capsys, *words, path)
        assert (code, "\033" in text) == (2, False)
        assert "found the name '\\x1b[31m" in text


def test_what_a_pickle_wants_is_quoted_without_control_codes(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\033[31m\nsystem\n.")
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, "\033" in text) == (2, False)
    assert "refused" in text


def test_streams_still_at_their_seed(tmp_path: Path, capsys: Capture) -> None:
    found = ask_json(capsys, "inspect", save(rows_of(3, at_their_seed), tmp_path))["findings"]
    assert {(each["table"], *each["rows"]) for each in found} == {
        ("python", 0, 1, 2),
        ("numpy", 0),
        ("torch", 0),
    }
    assert all("still at its seed" in each["text"] for each in found)


def test_damaged_and_missing_rows_are_named(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    path = Path(shutil.copytree(saved / "4_ranks_save", tmp_path / "damaged"))
    (path / "__2_0.distcp").unlink()
    metadata = command.CheckpointMetadata(path)
    parts = metadata.chunks({"trainer.app.rng.torch"})["trainer.app.rng.torch"]
    (part,) = (part for part in parts if part.offsets[0] == 1)
    content = bytearray((path / part.file).read_bytes())
    content[part.start + part.length // 2] ^= 4
    (path / part.file).write_bytes(content)
    code, text = ask(capsys, "inspect", path)
    text = " ".join(text.split())
    assert code == 1
    assert "finding: trainer.app.rng, torch, row 1: damaged" in text
    for name in ("origin", "python", "numpy", "torch"):
        assert f"{name}, row 2: missing: __2_0.distcp is missing" in text
    # The others of these commands say that it cannot be trusted.
    code, text = ask(capsys, "diff", path, saved / "4_ranks_save")
    assert code == 2
    assert "2 rows compared, no stream differs" in text, "a damaged row is no difference"
    assert "2 rows of A missing or damaged" in text
    code, text = ask(capsys, "explain", path, "--world-size", 7)
    assert (code, "for row 1-2 is missing or damaged" in " ".join(text.split())) == (1, True)
    assert ask(capsys, "explain", path, "--world-size", 1)[0] == 0


def damage_origin(tables: dict[str, torch.Tensor], row: int, column: int, value: int) -> None:
    tables["origin"][row, column] = value


ORIGINS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "altered": ("row 1: .*does not fit its check word", lambda t: damage_origin(t, 1, 5, 9)),
    "newer": ("row 1: .*layout version 2", lambda t: damage_origin(t, 1, 0, 2)),
    "moved": ("row 1: .*says that it is row 0", lambda t: t["origin"][1].copy_(t["origin"][0])),
    "swapped": ("numpy, rows 0-1: damaged", lambda t: t["numpy"].copy_(t["numpy"].flip(0))),
    "absent": ("python: the checkpoint has no such table", lambda t: t.pop("python")),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_bad_rows_are_findings(case: str, tmp_path: Path, capsys: Capture) -> None:
    pattern, damage = ORIGINS[case]
    tables = rows_of(2)
    damage(tables)
    code, text = ask(capsys, "inspect", save(tables, tmp_path))
    assert code == 1
    assert re.search(pattern, " ".join(text.split()))


def test_rows_of_another_job_are_findings(tmp_path: Path, capsys: Capture) -> None:
    tables, others = rows_of(3), rows_of(3, seed=7)
    for name, table in tables.items():
        table[2] = others[name][2]
    _, text = ask(capsys, "inspect", save(tables, tmp_path))
    assert "origin, row 2: another seed than row 0's 42" in text


# What others wrote.


def test_rank_less_keys_have_lost_the_streams(saved: Path, capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", saved / "others_save" / "rank-less")
    assert code == 1
    text = " ".join(text.split())
    assert "one state for all ranks" in text
    assert re.search(r"python is rank \d's, numpy is rank \d's, torch is rank \d's", text)
    assert "pickles, which were not read" in text


def test_rank_named_keys_have_lost_nothing_yet(
    saved: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = saved / "others_save" / "rank-named"
    code, text = ask(capsys, "inspect", path)
    assert code == 0
    assert "rng.rank*: one key a rank, 4 ranks." in text

    def lose(metadata: Any) -> None:
        for name in ("python", "numpy", "torch"):
            del metadata.state_dict_metadata[f"rng.rank2.{name}"]

    path = Path(shutil.copytree(path, tmp_path / "lost"))
    change_metadata(path, lose)
    code, text = ask(capsys, "inspect", path)
    assert (code, "rng.rank*, row 2" in text) == (1, True)


def test_no_rng_state_at_all_is_a_finding(saved: Path, capsys: Capture) -> None:
    path = saved / "others_save" / "none"
    code, text = ask(capsys, "inspect", path)
    assert (code, "no RNG state in it" in text) == (1, True)
    for other in (["diff", path, path], ["explain", path, "--world-size", 2]):
        code, text = ask(capsys, *other)
        assert (code, "no StatefulRNG's tables" in text) == (2, True)


@pytest.mark.parametrize(
    ("keys", "path", "ranks"),
    [
        (["rng_state"], "", []),
        (["app.torch_rng_state", "app.cuda_rng_state.0", "app.cuda_rng_state.1"], "app", []),
        (["random_rng_state", "np_rng_state"], "", []),
        (["extra.python", "extra.numpy"], "extra", []),
        (["trainer.random_state"], "trainer", []),
        (["rng/0", "rng/1"], "rng/*", [0, 1]),
        (["rank_0.rng", "rank_1.rng"], "rank_*", [0, 1]),
        (["rng_states.0.torch", "rng_states.1.torch"], "rng_states.*", [0, 1]),
        (["weight", "python", "layers.0.random", "prng_head.weight"], None, []),
    ],
)
def test_names_of_rng_state(
    keys: list[str], path: str | None, ranks: list[int], tmp_path: Path, capsys: Capture
) -> None:
    state: dict[str, Any] = {key: torch.zeros(16, dtype=torch.uint8) for key in keys}
    dcp.save(state, checkpoint_id=tmp_path)
    others = ask_json(capsys, "inspect", tmp_path)["others"]
    assert [(each["path"], each["ranks"]) for each in others] == (
        [] if path is None else [(path, ranks)]
    )


# Many rows.


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 4,096 rows of which row 4,000 is damaged and row 4,001 shares a stream."""
    tables = rows_of(4096, shared_late)
    tables["torch"][4000, 7] ^= 1
    return save(tables, tmp_path_factory.mktemp("many") / "checkpoint")


def shared_late(row: int) -> States:
    return {**drawn_states(row), "python": drawn_states(17 if row == 4001 else row)["python"]}


def test_many_rows_are_summarised(many: Path, capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", many)
    assert code == 1
    assert len(text.splitlines()) < 30
    assert "python   4,096 good rows, 4,095 different" in text
    assert "torch    4,095 good rows, 4,095 different" in text
    assert "rng, python, rows 17, 4001: these rows share" in text
    assert "rng, torch, row 4000: damaged" in text
    _, text = ask(capsys, "inspect", many, "--rows", "12,40-44")
    shown = re.findall(r"^ *(\d+)  [0-9a-f]{12}", text, re.MULTILINE)
    assert list(map(int, shown)) == [12, 40, 41, 42, 43, 44]
    found = ask_json(capsys, "inspect", many, "--rows", "4000")["entries"][0]["streams"]
    assert [each["row"] for each in found] == [4000]


def test_many_fates_are_summarised(many: Path, capsys: Capture) -> None:
    code, text = ask(capsys, "explain", many, "--world-size", 5000)
    assert code == 1
    assert len(text.splitlines()) < 15
    assert "rows 4001-4095: continued" in text
    assert "rows 4096-4999: forked, from rows 0-903" in text


# diff.


def test_diff(many: Path, saved: Path, tmp_path: Path, capsys: Capture) -> None:
    a = save(rows_of(50), tmp_path / "a")
    assert ask(capsys, "diff", a, a) == (0, "rng: 50 rows compared, no stream differs\n")
    b = save(rows_of(50, lambda row: drawn_states(row + (row == 7))), tmp_path / "b")
    code, text = ask(capsys, "diff", a, b)
    assert code == 1
    assert "rng: 1 of 50 rows differ" in text
    assert re.findall(r"^ *(\d+)  (\w+)", text, re.MULTILINE) == [
        ("7", "python"),
        ("7", "numpy"),
        ("7", "torch"),
    ]
    (entry,) = ask_json(capsys, "diff", a, b)["entries"]
    assert list(entry["differing"]) == ["7"]

    fewer = save(rows_of(3, seed=9), tmp_path / "fewer")
    code, text = ask(capsys, "diff", a, fewer)
    assert (code, "rng: seed 42 in A, 9 in B" in text) == (1, True)
    assert "rng: rows 50 in A, 3 in B" in text
    assert "47 of 50 rows differ" in text
    code, text = ask(capsys, "diff", a, saved / "4_ranks_save")
    assert (code, "trainer.app.rng: only in B" in text) == (1, True)
    assert ask(capsys, "diff", a, tmp_path)[0] == 2
    assert "1 row of B missing or damaged" in ask(capsys, "diff", many, many)[1].replace("A", "B")


# explain.


@pytest.mark.parametrize("size", [2, 6])
def test_explain_foretells_what_real_ranks_get(size: int, saved: Path, capsys: Capture) -> None:
    path = saved / "4_ranks_save"
    (entry,) = ask_json(capsys, "explain", path, "--world-size", size)["entries"]
    real = json.loads((saved / f"resumed-{size}.json").read_text())
    assert [fate["digests"] for fate in entry["fates"][:size]] == real
    names = [fate["fate"] for fate in entry["fates"]]
    assert names == ["continued"] * min(size, 4) + (
        ["dropped"] * 2 if size == 2 else ["forked"] * 2
    )
    assert entry["needs_planner"]


def test_explain_foretells_another_mesh(saved: Path, capsys: Capture) -> None:
    path = saved / "4_ranks_that_are_not_ranked_save"
    mesh = ["--mesh", "dp=3,tp=2", "--along", "dp"]
    (entry,) = ask_json(capsys, "explain", path, "--world-size", 6, *mesh)["entries"]
    real = json.loads((saved / "resumed-mesh.json").read_text())
    assert [fate["digests"] for fate in entry["fates"][:3]] == real
    assert [fate["ranks"] for fate in entry["fates"]] == [[0, 1], [2, 3], [4, 5], []]
    assert [fate["fate"] for fate in entry["fates"]] == ["continued"] * 3 + ["dropped"]


def test_explain_rules(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    alike = saved / "4_ranks_that_are_not_ranked_save"
    code, text = ask(capsys, "explain", alike, "--world-size", 5)
    assert (code, "continued, from 0" in text) == (0, True)
    assert "forked, from 0" in ask(capsys, "explain", alike, "--world-size", 5, "--ranked")[1]
    text = ask(capsys, "explain", alike, "--world-size", 4)[1]
    assert "with plain dcp.load" in text
    text = ask(capsys, "explain", alike, "--world-size", 4, "--generators", "numpy,cuda")[1]
    assert "cuda: absent from the checkpoint" in text
    assert "torch: not read" in text
    assert "planner=RNGLoadPlanner()" in text
    for bad in (["--mesh", "dp=3"], ["--mesh", "dp=4", "--along", "tp"]):
        assert ask(capsys, "explain", alike, "--world-size", 4, *bad)[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", ".", "--rows", "a-b"],
        ["inspect", ".", "--rows", "9-3"],
        ["explain", ".", "--world-size", "0"],
        ["explain", ".", "--world-size", "4", "--mesh", "dp4"],
        ["explain", "."],
        [],
    ],
)
def test_a_bad_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2


# The terminal.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_long_read_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stderr = [0.0], Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = terminal.Progress("reading")
    now[0] = 0.5
    progress(1, 4)
    assert not stderr.getvalue(), "a read under a second shows nothing"
    now[0] = 1.5
    progress(2, 4)
    assert "] " in stderr.getvalue()
    assert " 50 %" in stderr.getvalue()
    progress.close()
    assert stderr.getvalue().endswith("\r")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress(3, 4)
    assert not sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_wide_tables_go_on_below() -> None:
    header = ["row", *(f"generator-{n}" for n in range(9))]
    lines = terminal.table(header, [["12345", *["0" * 12] * 9]], terminal.Style(io.StringIO()))
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("12345") for line in lines) == 2
    assert all(name in " ".join(lines) for name in header)
