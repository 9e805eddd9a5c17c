"""The recipe, killed for real: model, optimizer and streams continue bit for bit."""

import json
import random
from pathlib import Path

import demo
import numpy as np
import pytest
import torch
from checkpoints import CheckpointFolder
from gpt import GPT
from train_fsdp2 import draw_batch, read_text, validate_and_prepare_config

from nemo_rng_dcp import ScopedRNG, init_all_rng
from scripts.demo.launch import LaunchError, torchrun

STEPS = ["--steps", "9", "--save-every", "3"]


def test_a_killed_run_has_the_losses_of_the_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    torchrun(demo.RECIPE, 4, "--out", str(uninterrupted), *STEPS)
    kill = ["--die-at-step", "7", "--die-rank", "1"]
    output = torchrun(demo.RECIPE, 4, "--out", str(killed), *STEPS, *kill, restarts=1)
    assert "resumed from step-00000006" in output
    for rank in range(4):
        assert demo.first_difference(killed, uninterrupted, rank) is None
        steps = [step for step, _ in demo.read_losses(killed, rank)]
        assert steps == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8], "step 6 is trained twice, no other is"
    kept = [path.name for path in CheckpointFolder(killed / "checkpoints", keep=2).complete()]
    assert kept == ["step-00000006", "step-00000009"]


def test_a_kill_without_a_restart_is_reported(tmp_path: Path) -> None:
    kill = ["--die-at-step", "1", "--die-rank", "0"]
    with pytest.raises(LaunchError, match="ended with 1"):
        torchrun(demo.RECIPE, 1, "--out", str(tmp_path), *STEPS, *kill, "--deterministic")
    # What the results depend on is on disk even so, the deterministic algorithms among it.
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["seed"], run["world_size"], run["config"]["steps"]) == (42, 1, 9)
    assert run["environment"]["torch"] == torch.__version__
    assert run["environment"]["determinism"]["algorithms"] is True


def test_the_loss_depends_on_every_stream(tmp_path: Path) -> None:
    """A comparison of losses proves nothing about a stream that no loss depends on."""
    config = validate_and_prepare_config(["--out", str(tmp_path), "--batch", "16"])
    text, cpu = read_text(), torch.device("cpu")
    with ScopedRNG(0):
        model = GPT(config.length, config.width, config.heads, config.layers, config.dropout)

    def loss(move: object = None) -> float:
        init_all_rng(1)
        if callable(move):
            move()
        return model(draw_batch(text, config, cpu)).item()

    moves = [None, random.random, np.random.random, lambda: torch.rand(1)]
    assert loss() == loss()
    assert len({loss(move) for move in moves}) == len(moves)


def test_only_complete_checkpoints_are_seen(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    assert folder.newest() is None
    for name in ("step-00000010", "step-00000009", "step-00000020.incomplete"):
        (tmp_path / name).mkdir()
    assert folder.newest() == tmp_path / "step-00000010"


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--heads", "3"], ["--dropout", "1"], ["--rng", "none"]]
)
def test_a_bad_configuration_is_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        validate_and_prepare_config(["--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def write_losses(out: Path, offset: float) -> Path:
    out.mkdir()
    for rank in range(demo.RANKS):
        lines = [f"{step} {float(step + offset).hex()}\n" for step in range(demo.STEPS)]
        (out / f"losses-rank{rank}.txt").write_text("".join(lines))
    return out


def test_the_demo_sees_one_different_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = write_losses(tmp_path / "uninterrupted", 0.5)
    equal = write_losses(tmp_path / "equal", 0.5)
    rank_less = write_losses(tmp_path / "rank-less", 0.75)
    assert demo.report(uninterrupted, equal, rank_less)
    assert capsys.readouterr().out.count("differs from step 0") == demo.RANKS

    file = equal / "losses-rank3.txt"
    file.write_text(file.read_text().replace("30 " + (30.5).hex(), "30 " + (30.5 + 2**-47).hex()))
    assert not demo.report(uninterrupted, equal, rank_less)
    assert "differs from step 30" in capsys.readouterr().out


def write_streams(out: Path, event: str, streams: list[str]) -> Path:
    out.mkdir(exist_ok=True)
    for rank, digits in enumerate(streams):
        note = {"event": event, "step": demo.RESUMED_STEP, "streams": {"torch": digits}}
        (out / f"streams-rank{rank}.jsonl").write_text(json.dumps(note) + "\n")
    return out


def test_the_demo_tells_what_became_of_each_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = write_streams(tmp_path / "killed", "saved", ["a", "b", "c", "d"])
    fewer = write_streams(tmp_path / "fewer", "restored", ["a", "b"])
    more = write_streams(tmp_path / "more", "restored", ["a", "b", "c", "d", "e", "f"])
    assert demo.report_fates(killed, fewer, more)
    assert capsys.readouterr().out in (Path(__file__).parent.parent / "README.md").read_text()

    for bad in (
        ["a", "b", "c", "d", "b", "f"],
        ["a", "b", "c", "d", "e", "e"],
        [*"abcx", "e", "f"],
    ):
        write_streams(tmp_path / "more", "restored", bad)
        assert not demo.report_fates(killed, fewer, more)
    write_streams(tmp_path / "fewer", "restored", ["b", "a"])
    assert demo.fates(2, fewer, killed) == ["MIXED UP", "MIXED UP", "dropped", "dropped"]


def test_a_job_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Model, optimizer and streams together, through the recipe."""
    torchrun(demo.RECIPE, 2, "--out", str(tmp_path), "--steps", "2", "--save-every", "2")
    output = torchrun(demo.RECIPE, 3, "--out", str(tmp_path), "--steps", "4", "--save-every", "2")
    assert "resumed from step-00000002" in output
    assert "row 2 is new" in output
    last = [demo.read_losses(tmp_path, rank)[-1] for rank in range(3)]
    assert [step for step, _ in last] == [3, 3, 3]
    assert len({loss for _, loss in last}) == 3
