"""What the demo says of a run is what the run's files say."""

import sys
from pathlib import Path

import pytest

from scripts.demo import __main__ as demo
from scripts.demo import recipes, runs
from scripts.demo.launch import Launch, LaunchError

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()


def write_losses(out: Path, offset: float, first: int = 0) -> Path:
    out.mkdir(parents=True)
    for rank in range(demo.RANKS):
        lines = [f"{step} {(step + offset).hex()}\n" for step in range(first, demo.STEPS)]
        (out / f"losses-rank{rank}.txt").write_text("".join(lines))
    return out


def write_demo(out: Path, per_rank: float = 0.5, rank_less: float = 0.75) -> None:
    """Write the losses of a demo whose uninterrupted run has the offset 0.5."""
    write_losses(out / demo.UNINTERRUPTED.name, 0.5)
    write_losses(out / demo.PER_RANK.name, per_rank)
    write_losses(out / demo.RANK_LESS.name, rank_less)
    for processes, step in demo.FEWER.items():
        write_losses(out / demo.resumed_on(processes).name, per_rank, step)


def test_the_demo_sees_one_different_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo(tmp_path)
    assert demo.report(tmp_path)
    assert capsys.readouterr().out.count("differs from step 0") == demo.RANKS

    file = tmp_path / demo.resumed_on(1).name / "losses-rank3.txt"
    file.write_text(file.read_text().replace("31 " + (31.5).hex(), "31 " + (31.5 + 2**-47).hex()))
    assert not demo.report(tmp_path)
    assert "differs from step 31" in capsys.readouterr().out


def test_a_step_that_was_never_trained_differs(tmp_path: Path) -> None:
    uninterrupted = write_losses(tmp_path / "uninterrupted", 0.5)
    ended = write_losses(tmp_path / "ended", 0.5)
    file = ended / "losses-rank0.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:30]) + lines[30].rstrip("\n"))  # killed while it wrote a line
    assert runs.last_step(ended, 0) == 29
    assert runs.first_difference(ended, uninterrupted, 0) == 30
    assert runs.first_difference(ended, uninterrupted, 1) is None
    assert runs.last_step(tmp_path / "not begun", 0) == -1


def test_fates_tell_what_became_of_each_stream() -> None:
    def streams(letters: str) -> runs.Streams:
        return {row: {"torch": letter} for row, letter in enumerate(letters)}

    saved = streams("abcd")
    for good in ("ab", "abcdef"):
        assert runs.fates(streams(good), saved) == runs.expected_fates(len(good), 4)
    for bad in ("abcdbf", "abcdee", "abcxef"):
        assert runs.fates(streams(bad), saved) != runs.expected_fates(len(bad), 4)
    assert runs.fates(streams("ba"), saved) == ["MIXED UP", "MIXED UP", "dropped", "dropped"]


def test_the_page_shows_what_the_demo_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo(tmp_path)
    demo.report(tmp_path)
    printed = capsys.readouterr().out.replace("differs from step 0", "differs from step 20")
    assert printed in PAGE


def test_a_wrong_finding_fails_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    good = recipes.Finding("train_ddp", "killed: losses", ["equal"], ["equal"])
    bad = recipes.Finding("train_ddp", "on 1 rank: streams", ["forked"], ["continued"])
    assert recipes.report([good])
    assert "FAILED" not in capsys.readouterr().out
    assert not recipes.report([good, bad])
    assert (
        "FAILED: train_ddp, on 1 rank: streams: expected ['continued']" in capsys.readouterr().out
    )


def test_a_rollout_is_taken_over_in_parts(tmp_path: Path) -> None:
    for run, parts in (("whole", ["[1, 2, 3]", "[4, 5, 6]"]), ("other", ["[1, 2]", "[3, 4]"])):
        (tmp_path / run).mkdir()
        for rank, part in enumerate([*parts, "[5, 7]"]):
            (tmp_path / run / f"rollouts-rank{rank}.txt").write_text(f"10 {part}\n")
    found = recipes.rollout_taken_over(tmp_path / "whole", 2, tmp_path / "other", 3, 10)
    assert found == ["equal", "equal", "DIFFERENT"]


@pytest.fixture
def runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell's script in the place of Python, which would import torch for torchrun."""
    command = tmp_path / "python"
    command.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    return command


def test_a_launch_that_fails_is_an_error(runs_alone: Path) -> None:
    runs_alone.write_text("#!/bin/sh\necho what went wrong; exit 3")
    with pytest.raises(LaunchError, match=r"script\.py on 2 ranks ended with 3:\nwhat went wrong"):
        Launch(Path("script.py"), 2).output()


def test_a_launch_that_ends_before_the_moment_to_kill_is_an_error(runs_alone: Path) -> None:
    runs_alone.write_text("#!/bin/sh\necho nothing happened")
    with pytest.raises(LaunchError, match=r"no moment to kill rank 0:\n(.*\n)*nothing happened"):
        Launch(Path("script.py"), 1).kill(0, lambda: False)


def test_a_launch_that_takes_too_long_is_ended(runs_alone: Path) -> None:
    runs_alone.write_text("#!/bin/sh\nexec sleep 100")
    launch = Launch(Path("script.py"), 1, timeout=1)
    with pytest.raises(LaunchError, match=r"script\.py on 1 ranks took over 1 s"):
        launch.output()
    assert launch.process.poll() is not None
