"""The benchmark's smallest setting: every row is there and holds a number. No time is judged."""

import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from scripts import bench, bench_planning, bench_worker
from scripts.bench_timing import Spread, Target, columns, growth
from scripts.bench_ways import Alone, Way, plain_capture, plain_restore

Results = tuple[str, dict[str, Any], list[str]]
WAYS = ["alone", "tables", "file_per_rank", "gathered", "rank_named", "one_tensor"]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """What one run prints, its JSON, and the temporary folders it made."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        folders: list[str] = []
        real = tempfile.mkdtemp

        def mkdtemp(*arguments: Any) -> str:
            folders.append(real(*arguments))
            return folders[-1]

        patch.setattr("tempfile.mkdtemp", mkdtemp)
        patch.setattr("builtins.print", lambda line="", **_: printed.append(str(line)))
        bench.main(["--quick", "--json", str(file)])
    torch.set_num_threads(threads)
    return "\n".join(printed), json.loads(file.read_text()), folders


def numbers(value: Any) -> list[float]:
    """Return every number in a value, however deep."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def test_every_row_is_printed(results: Results) -> None:
    printed, _, _ = results
    assert "cores, CPU, gloo; Python" in printed
    rows = [
        "capture",
        "check and restore",
        "with ScopedRNG",
        "Generator().manual_seed",
        "np.random.get_state()",
        "save, 2 ranks",
        "load, 2 ranks",
        "async_save, 2 ranks",
    ]
    rows += ["bytes, 2 ranks", "files, 2 ranks", "4 ranks", "8 ranks", "save plan: grows"]
    rows += ["save plan at 16,384 ranks", "captured, in memory"]
    rows += ["kept after a load", "in the checkpoint"]
    for row in rows:
        assert re.search(rf"^{re.escape(row)}.*\d", printed, re.MULTILINE), row


def test_the_json_has_every_measurement(results: Results) -> None:
    _, result, _ = results
    assert all(math.isfinite(number) for number in numbers(result))
    calls = result["calls"]["seconds"]
    assert calls.keys() >= {"state_dict", "load_state_dict", "plain_capture", "plain_restore"}
    assert min(numbers(calls)) > 0
    (checkpoint,) = result["checkpoints"]
    for seconds in (checkpoint["seconds"]["wall"], checkpoint["seconds"]["cpu"]):
        ways = {operation: list(by_way) for operation, by_way in seconds.items()}
        assert ways == {"save": WAYS, "load": WAYS, "async_save": WAYS[:2]}
        assert {len(rounds) for by_way in seconds.values() for rounds in by_way.values()} == {2}
        assert min(numbers(seconds)) > 0
    planning = result["planning"]
    assert [p["ranks"] for p in planning["tables"]] == [4, 8]
    assert [p["ranks"] for p in planning["rank_named"]] == [4, 8]
    assert [p["ranks"] for p in planning["model_and_tables"]] == [4]
    assert min(numbers(planning["tables"])) > 0
    assert {target["verdict"] for target in result["targets"]} <= {
        "met",
        "MISSED",
        "too noisy to say",
    }


def test_what_is_left_on_disk_and_in_memory(results: Results) -> None:
    """Sizes, unlike times, are the same on every machine."""
    _, result, _ = results
    (checkpoint,) = result["checkpoints"]
    on_disk = checkpoint["on_disk"]
    files = {way: on_disk[way]["files"] - on_disk["alone"]["files"] for way in WAYS}
    assert files == {
        "alone": 0,
        "tables": 0,
        "file_per_rank": 2,
        "gathered": 0,
        "rank_named": 0,
        "one_tensor": 0,
    }
    state_bytes = 8 * (10 + 628 + 628 + 633)
    assert state_bytes < result["checkpoint_bytes_per_rank"] < 2 * state_bytes
    assert result["calls"]["memory"]["state_dict"] >= state_bytes


def test_nothing_is_left_behind(results: Results) -> None:
    _, _, folders = results
    assert folders
    assert not any(Path(folder).exists() for folder in folders)
    assert not torch.distributed.is_initialized()


class Recorder(Alone):
    """A way that does nothing but say that it was asked."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def save(self, app: Any, folder: Path) -> None:
        self.calls.append(f"save {self.name}")

    def load(self, app: Any, folder: Path) -> None:
        self.calls.append(f"load {self.name}")


def test_ways_take_turns_after_one_that_does_not_count(
    tmp_path: Path, fake_group: Callable[[int, int], None]
) -> None:
    fake_group(0, 1)
    calls: list[str] = []
    seconds: bench_worker.Seconds = {}
    ways: dict[str, Way] = {name: Recorder(name, calls) for name in "abc"}
    bench_worker.measure_rounds(seconds, ways, cast(Any, None), tmp_path, rounds=2)
    expected = ["save a", "load a", "save b", "load b", "save c", "load c"]
    for turn in ("cabc", "abca"):
        expected += [f"{operation} {name}" for operation in ("save", "load") for name in turn]
    assert calls == expected
    assert {len(values) for values in seconds["wall"]["save"].values()} == {2}


def test_the_plain_way_brings_the_streams_back() -> None:
    torch.randn(3)
    state = plain_capture()
    expected = torch.randn(3)
    plain_restore(state)
    assert torch.equal(torch.randn(3), expected)


def test_a_wrongly_derived_plan_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_planning, "plan_of_rank", lambda own, rank: own)
    try:
        with pytest.raises(RuntimeError, match="rank 1 is not what DCP makes"):
            bench_planning.plan(4, bench_planning.tables)
    finally:
        torch.distributed.destroy_process_group()


def test_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread(2e-3, 1e-3, 3e-3).text(1e-3, sign="+") == "+2.0 [+1.0, +3.0]"


@pytest.mark.parametrize(
    ("limit", "verdict"), [(100.0, "met"), (50.0, "too noisy to say"), (10.0, "MISSED")]
)
def test_a_target_is_judged_by_the_confidence_in_the_median(limit: float, verdict: str) -> None:
    assert Target.at_most(limit, "", [float(value) for value in range(101)]).verdict == verdict


def test_growth_is_fitted() -> None:
    assert growth([1, 10, 100], [3, 300, 30000]) == pytest.approx(2)


def plannings(*seconds: float) -> list[bench_planning.Planning]:
    return [
        bench_planning.Planning(2**number, 0, value, 0, 0)
        for number, value in enumerate(seconds, start=1)
    ]


def test_seconds_beyond_what_was_measured_follow_the_growth_of_the_largest() -> None:
    measured = plannings(5, 5, 4, 16, 64)  # flat among few ranks, quadratic then
    assert bench_planning.seconds_at(measured, 32) == (64, True)
    assert bench_planning.seconds_at(measured, 64) == (pytest.approx(256), False)


def test_columns_line_up() -> None:
    assert columns([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc   d"]
