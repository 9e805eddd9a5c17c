"""The benchmark's smallest setting: every row is there and holds a number. No time is judged."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from scripts.bench import __main__ as bench
from scripts.bench import checkpoint, planning, processes, ranks
from scripts.bench.checkpoint import Checkpoint
from scripts.bench.table import Row, Section, filled, text
from scripts.bench.timing import Target, cpu_seconds, growth
from scripts.bench.ways import Way, plain_capture, plain_restore
from tests.support.ranks import server

Results = tuple[str, dict[str, Any], Path]
PAGE = Path(bench.__file__).parents[2] / "docs" / "cost.md"
WAYS = [
    "alone",
    "record",
    "tensor",
    "least",
    "file_per_rank",
    "gathered",
    "rank_named",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one run prints, its JSON, and the folder in which it made its checkpoints."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    folder = tmp_path_factory.mktemp("checkpoints")
    threads = torch.get_num_threads()
    server()  # begins the fork server, of which the ranks of the other tests are forks, too
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr(checkpoint, "memory_folder", lambda: folder)
        patch.setattr(processes, "import_seconds", import_seconds)
        patch.setattr("builtins.print", lambda line="", **_: printed.append(str(line)))
        (page := file.with_name("cost.md")).write_text(PAGE.read_text())
        bench.main(["--quick", "--json", str(file), "--page", str(page)])
    torch.set_num_threads(threads)
    result = json.loads(file.read_text()) | {"page": page.read_text()}
    return "\n".join(printed), result, folder


def import_seconds(statement: str) -> float:
    """Import ours in a fresh process, as the benchmark does, and torch in this one."""
    if statement == processes.OURS:
        return _in_a_fresh_process(statement)
    spent, _ = cpu_seconds(partial(exec, statement, {}))
    return spent


_in_a_fresh_process = processes.import_seconds


def numbers(value: Any) -> list[float]:
    """Return every number in a value, however deep."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize(
    "row",
    [
        "capture",
        "check + restore",
        "a batch of ResumableLoader",
        "with ScopedRNG",
        "with rng.as_rank",
        "checkpoint(context_fn=rng.recompute)",
        "dcp.save",
        "dcp.load",
        "dcp.async_save",
        "dcp.save, 2 ranks",
        "StatefulRNG",
        "a file per rank",
        "gathered into one file",
        "rank-named keys",
        "8 ranks",
        "exponent, 4 to 8 ranks",
        "share beside Llama 3 8B, 4 ranks",
        "metadata a rank, up to 8 ranks",
        "plain dcp.load",
        "RNGLoadPlanner",
        "import, CPU time",
        "CPU time",
        "memory",
        "a step, CPU time",
        "clip_grad_norm_, CPU time",
    ],
)
def test_every_row_is_printed(results: Results, row: str) -> None:
    printed, _, _ = results
    assert "cores, CPU, gloo; Python" in printed
    assert re.search(rf"^{re.escape(row)}.*\s-?\d", printed, re.MULTILINE)


def test_the_json_has_every_measurement(results: Results) -> None:
    _, result, _ = results
    assert all(math.isfinite(number) for number in numbers(result))
    assert result["calls"].keys() >= {"state_dict", "load_state_dict", "plain_capture"}
    assert min(numbers(result["calls"])) > 0
    (saved,) = result["checkpoints"]
    ways = {operation: list(by_way) for operation, by_way in saved["seconds"].items()}
    assert ways == {"save": WAYS, "load": WAYS, "async_save": WAYS[:2]}
    rounds = [len(seconds) for by_way in saved["seconds"].values() for seconds in by_way.values()]
    assert set(rounds) == {2}
    assert min(numbers(saved["seconds"])) > 0
    planned = result["planning"]
    assert [plan["ranks"] for plan in planned["records"]] == [4, 8]
    assert [plan["ranks"] for plan in planned["rank_named"]] == [4, 8]
    assert [plan["ranks"] for plan in planned["model_and_records"]] == [4]
    assert min(numbers(planned)) > 0
    assert [plan["ranks"] for plan in planned["tensor"]] == [4, 8]
    assert {len(rounds) for rounds in result["imports"].values()} == {1}
    assert result["inspect"]["rows"] == 4
    (trained,) = result["elastic"]
    assert min(numbers(trained["seconds"])) > 0


def test_bytes_of_the_elastic_recipes_reduction(results: Results) -> None:
    """On 2 processes with 4 logical ranks each, whose gradients add up to one sum."""
    _, result, _ = results
    (trained,) = result["elastic"]
    size, sent, held = trained["gradients"], trained["sent"], trained["held"]
    assert sent == {"in order": size / 2, "own": 4 * size / 2, "own, once": size / 2}
    assert held == {"in order": 2 * size, "own": size / 2, "own, once": size}


def test_what_is_left_on_disk(results: Results) -> None:
    """Sizes, unlike times, are the same on every machine."""
    _, result, _ = results
    (saved,) = result["checkpoints"]
    ranks, copies, on_disk = saved["ranks"], saved["copies"], saved["on_disk"]
    assert (ranks, copies) == (2, 2)
    files = {way: on_disk[way]["files"] - on_disk["alone"]["files"] for way in WAYS}
    several = {"file_per_rank": ranks * copies, "gathered": copies}
    assert files == {**dict.fromkeys(WAYS, 0), **several}
    added = {way: on_disk[way]["bytes"] - on_disk["alone"]["bytes"] for way in WAYS}
    states = (2512 + 2512 + 5056) * ranks * copies
    assert states < added["record"] < 1.5 * states
    # The tensor that is compared has as many bytes.
    assert added["tensor"] == pytest.approx(added["record"], rel=0.01)
    metadata = {way: on_disk[way]["metadata"] - on_disk["alone"]["metadata"] for way in WAYS}
    assert metadata["file_per_rank"] == metadata["gathered"] == 0
    assert 100 * ranks * copies < metadata["record"] < metadata["rank_named"]


def test_of_several_copies_one_is_told() -> None:
    seconds, on_disk = {"alone": [1.0, 2.0], "record": [3.0, 6.0]}, {"bytes": 10}
    found = Checkpoint(2, 256, 4, {"save": seconds}, {"alone": on_disk, "record": {"bytes": 90}})
    assert found.adds("save", "record") == [0.5, 1.0]
    assert found.adds_on_disk("bytes", "record") == 20


def test_ways_are_compared_on_real_ranks_and_by_planning(results: Results) -> None:
    _, result, _ = results
    tables = result["comparisons"]
    assert [table["title"] for table in tables] == [
        "added on 2 ranks, CPU time",
        "added on 4 ranks, by planning alone",
        "added on 8 ranks, by planning alone",
    ]
    for table, count in zip(tables, (2, 4, 8), strict=True):
        rows = {name: cells for name, *cells in table["rows"]}
        files = {name: cells[2] for name, cells in rows.items()}
        assert files == {
            **dict.fromkeys(rows, "0"),
            "a file per rank": str(count),
            "gathered into one file": "1",
        }
        held = {name: float(cells[-1].split()[0]) for name, cells in rows.items()}
        assert held["gathered into one file"] > 0.9 * count * held["StatefulRNG"]


def test_nothing_is_left_behind(results: Results) -> None:
    _, _, folder = results
    assert not list(folder.iterdir())
    assert not torch.distributed.is_initialized()


class Recorder:
    """A way that does nothing but say that it was asked."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def save(self, app: Any, folder: Path) -> None:
        self.calls.append(f"save {self.name}")

    def load(self, app: Any, folder: Path) -> None:
        self.calls.append(f"load {self.name}")


def test_ways_take_turns_after_one_that_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_group: Callable[[int, int], None]
) -> None:
    fake_group(0, 1)
    monkeypatch.setattr(ranks, "check", lambda *_: None)
    calls: list[str] = []
    seconds: ranks.Seconds = {}
    ways: dict[str, Way] = {name: Recorder(name, calls) for name in "abc"}
    ranks.measure_rounds(seconds, ways, cast(Any, None), tmp_path, rounds=2)
    assert calls == [
        f"{operation} {name}"
        for turn in ("cabc", "abca")
        for operation in ("save", "load")
        for name in turn
    ]
    assert {len(values) for values in seconds["save"].values()} == {2}


def test_a_way_that_does_not_bring_the_streams_back_is_noticed(
    tmp_path: Path, fake_group: Callable[[int, int], None]
) -> None:
    fake_group(0, 1)
    with pytest.raises(RuntimeError, match="idle did not bring back the streams of rank 0"):
        ranks.check("idle", Recorder("idle", []), cast(Any, None), tmp_path)


def test_the_plain_way_brings_the_streams_back() -> None:
    torch.randn(3)
    state = plain_capture()
    expected = torch.randn(3)
    plain_restore(state)
    assert torch.equal(torch.randn(3), expected)


def test_a_wrongly_derived_plan_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "plan_of_rank", lambda own, rank: own)
    try:
        with pytest.raises(RuntimeError, match="rank 1 is not what DCP makes"):
            planning.plan(4, planning.records, {})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("limit", "verdict"), [(100.0, "met"), (50.0, "too noisy to say"), (10.0, "MISSED")]
)
def test_a_ratio_is_judged_by_the_confidence_in_the_median(limit: float, verdict: str) -> None:
    target = Target.ratio(limit, [float(value) for value in range(101)], [1.0] * 101)
    assert (target.found, target.verdict) == ("50.00x", verdict)


def test_a_number_is_judged_by_its_limit() -> None:
    assert Target.at_most(2, 2.0).verdict == Target.at_least(2, 2.0).verdict == "met"
    assert Target.at_most(2, 2.1).verdict == Target.at_least(2, 1.9).verdict == "MISSED"


def test_growth_is_fitted() -> None:
    assert growth([1, 10, 100], [3, 300, 30000]) == pytest.approx(2)


def test_seconds_are_printed_in_a_unit_that_suits_them() -> None:
    assert text([0.5e-3, 1.26e-3, 9.0]) == "1.3 ms"
    assert [text(42.0), text(73e-6), text(5.8e-6)] == ["42 s", "73 us", "5.8 us"]


def test_columns_line_up() -> None:
    rows = [Row("capture", "75 us", "30 us", Target.at_most(3, 2.5, "x")), Row("scope", "8 us")]
    assert Section("one call", "plain", rows).lines() == [
        "one call  StatefulRNG  plain  found      target",
        "capture         75 us  30 us   2.5x  at most 3x  met",
        "scope            8 us",
    ]


def test_a_pages_blocks_get_the_tables_of_their_titles() -> None:
    page = "# Cost\n\n```text\none call  old\ncapture  1\n```\n\n```text\nanother\n```\n"
    blocks = {"one call": ["one call  new", "capture     2"], "two": ["two"]}
    expected = "# Cost\n\n```text\none call  new\ncapture     2\n```\n\n```text\nanother\n```\n"
    assert filled(page, blocks) == expected


def test_the_page_has_a_block_for_every_table(results: Results) -> None:
    """But for numbers in titles, which are the quick run's own."""
    _, result, _ = results
    blocks = re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    shown = [re.sub(r"[\d.,]+", "N", block) for block in blocks]
    titles = [re.sub(r"[\d.,]+", "N", entry["title"]) for entry in result["tables"]]
    assert [t for t in titles if not any(block.startswith(t) for block in shown)] == []


def test_a_run_fills_the_page(results: Results) -> None:
    printed, result, _ = results
    [line] = [line for line in printed.split("\n") if line.startswith("capture")]
    assert line in result["page"]
    assert line not in PAGE.read_text()
