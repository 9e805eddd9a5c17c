"""The recipes, killed for real: what is trained and drawn continues bit for bit."""

import ast
import gc
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import ScopedRNG, StatefulRNG, init_all_rng
from scripts.demo import recipes, runs
from scripts.demo.recipes import Recipe
from scripts.recipes import train_ddp, train_fsdp2, train_grpo, train_hsdp_tp
from tests.support.jobs import job
from tests.support.recipes import SHORT, SMALL, train_forked, train_under_torchrun
from tests.support.scripts import agent, execute

FOLDER = Path(train_fsdp2.__file__).parent
MODELS = {
    "train_fsdp2": train_fsdp2.GPT,
    "train_ddp": train_ddp.build_model,
    "train_hsdp_tp": train_hsdp_tp.MLP,
    "train_grpo": train_grpo.Policy,
    "train_elastic": train_fsdp2.GPT,  # the same model
}


UNDER_TORCHRUN = "train_fsdp2"
"""The others run on forked ranks here, and all under torchrun in `make recipes`."""


def module_of(name: str) -> Any:
    # As a script that runs, which finds the files beside it.
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(f"scripts.recipes.{name}")


@pytest.mark.parametrize("recipe", SMALL.values(), ids=SMALL)
def test_a_killed_job_continues(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < recipe.job.ranks:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a recipe takes a GPU for each rank
    train = train_under_torchrun if recipe.name == UNDER_TORCHRUN else train_forked
    monkeypatch.setattr(recipes, "train", train)
    findings = list(recipes.compare(recipe, tmp_path))
    assert {finding.compared: finding.found for finding in findings} == {
        finding.compared: finding.expected for finding in findings
    }
    retrained = [step for step, _ in runs.read_steps(tmp_path / "killed", 0)]
    assert retrained.count(SHORT.resumed_step) == 2, "the kill came after the checkpoint"
    assert (tmp_path / "killed" / "run.json").exists()
    if recipe.name == "train_hsdp_tp":
        # Dropout on the copies of an activation hit the same elements, or the losses would differ.
        losses = [dict(runs.read_steps(tmp_path / "killed", rank)) for rank in range(2)]
        assert losses[0] == losses[1]
    if recipe.name == "train_grpo":
        rollouts, updates = (
            [step for step, _ in runs.read_steps(tmp_path / "killed", 1, note)]
            for note in recipe.notes
        )
        step = SHORT.resumed_step
        last = rollouts[: rollouts.index(step, rollouts.index(step) + 1)][-1]
        assert rollouts.count(last) == updates.count(last) + 1, "killed before the update"


def gradient_of_a_norm() -> torch.Tensor:
    norm = torch.nn.LayerNorm(64)
    with ScopedRNG(0):
        norm(torch.rand(2000, 64)).square().sum().backward()
    assert norm.weight.grad is not None
    return norm.weight.grad


def gradients_before_and_after(out: Path, variables: dict[str, str]) -> tuple[int, bool]:
    """Return the number of threads that the elastic recipe leaves, and whether a sum is another."""
    torch.set_num_threads(2)
    before = gradient_of_a_norm()
    execute(FOLDER / "train_elastic.py", ("--out", str(out), "--steps", "1"), variables)
    return torch.get_num_threads(), torch.equal(gradient_of_a_norm(), before)


def test_the_elastic_recipe_sets_the_number_of_threads(tmp_path: Path) -> None:
    """torchrun does so for several processes only, and sums depend on it."""
    with agent() as variables:
        found = job(1, gradients_before_and_after, tmp_path, variables, group=False)
    assert found == [(1, False)]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_batches_move_no_stream(workers: int, tmp_path: Path) -> None:
    config = train_ddp.Config(out=tmp_path, steps=6, save_every=4, workers=workers, samples=80)
    for _ in range(2):  # to the end; then again, from the checkpoint in the middle of the epoch
        training = train_ddp.setup_model_and_optimizer(config, "cpu")
        train_ddp.train(config, "cpu", training, StatefulRNG(42, ranked=True))
        del training
        # A forked worker that collected this DDP would wait for gloo's threads, which it has not.
        gc.collect()
    steps = runs.read_steps(tmp_path, 0)
    assert [step for step, _ in steps] == [0, 1, 2, 3, 4, 5, 4, 5]
    assert steps[4:6] == steps[6:]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", SMALL)
def test_the_newest_complete_checkpoints_are_kept(name: str, tmp_path: Path) -> None:
    recipe = module_of(name)
    assert recipe.complete_checkpoints(tmp_path) == []
    for step in (9, 10):
        recipe.save_checkpoint(tmp_path, 2, {"step": torch.tensor(step)}, step)
    killed = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (11, 12)]
    for folder in killed:  # a save that did not get to .metadata
        folder.mkdir()
        (folder / "__7_0.distcp").touch()
    found = [path.name for path in recipe.complete_checkpoints(tmp_path)]
    assert found == ["step-00000009", "step-00000010"]

    recipe.save_checkpoint(tmp_path, 2, {"step": torch.tensor(12)}, 12)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000010", "step-00000012"]
    assert not (killed[1] / "__7_0.distcp").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *[(name, ["--steps", "0"], "--steps is 0, expected >= 1") for name in SMALL],
        *[(name, ["--dropout", "1"], "--dropout is 1.0, expected 0 <= dropout") for name in SMALL],
        ("train_fsdp2", ["--save-every", "-1"], "--save-every is -1, expected >= 1"),
        ("train_fsdp2", ["--heads", "3"], "--width is 64, expected a multiple of --heads 3"),
        ("train_ddp", ["--workers", "-1"], "--workers is -1, expected >= 0"),
        ("train_ddp", ["--samples", "23"], "--samples is 23, expected >= 24"),
        ("train_hsdp_tp", ["--tp", "2"], "3 ranks, expected a multiple of --replicate 1 x --tp 2"),
        ("train_hsdp_tp", ["--tp", "0"], "--tp is 0, expected >= 1"),
        ("train_hsdp_tp", ["--tp", "3", "--width", "2"], "--tp is 3, expected a divisor of 4 x"),
        ("train_grpo", ["--groups", "4"], "--groups is 4, expected a multiple of 3 ranks"),
        ("train_elastic", ["--reduction", "x"], "--reduction is x, expected ordered or fsdp2"),
    ],
)
def test_a_bad_configuration_is_one_line(
    name: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stopped:
        module_of(name).validate_and_prepare_config(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_of_another_model_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = module_of(name), ["--out", str(tmp_path)]
    config = recipe.validate_and_prepare_config([*out, "--width", "32"])
    state = {"app": {"model": MODELS[name](config).state_dict()}}
    dcp.save(state, checkpoint_id=tmp_path / "checkpoints" / "step-00000001", no_dist=True)
    assert recipe.validate_and_prepare_config([*out, "--width", "32"]) == config
    with pytest.raises(SystemExit):
        recipe.validate_and_prepare_config([*out, "--width", "64"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000001 has" in line


def fsdp2_loss() -> Callable[[], float]:
    config = train_fsdp2.Config(batch=16)
    with ScopedRNG(0):
        model, text = train_fsdp2.GPT(config), train_fsdp2.read_text()
    return lambda: float(model(train_fsdp2.draw_batch(text, config, "cpu")).item())


def hsdp_tp_loss() -> Callable[[], float]:
    config, dropout = train_hsdp_tp.Config(), torch.Generator()
    with ScopedRNG(0):
        model = train_hsdp_tp.MLP(config, dropout)

    def loss() -> float:
        dropout.set_state(torch.get_rng_state())
        return float(model(*train_hsdp_tp.draw_batch(config, "cpu")).item())

    return loss


@pytest.mark.parametrize("make_loss", [fsdp2_loss, hsdp_tp_loss])
def test_the_loss_depends_on_every_stream(make_loss: Callable[[], Callable[[], float]]) -> None:
    """A comparison of losses proves nothing about a stream that no loss depends on."""
    loss_now = make_loss()

    def loss(move: object = None) -> float:
        init_all_rng(3)
        if callable(move):
            move()
        return loss_now()

    moves = [None, lambda: random.seed(0), np.random.random, lambda: torch.rand(1)]
    assert loss() == loss()
    assert len({loss(move) for move in moves}) == len(moves)


def test_sharded_dropout_draws_from_its_own_generator() -> None:
    generator = torch.Generator()
    block = train_hsdp_tp.Block(train_hsdp_tp.Config(dropout=0.5), generator)

    def outcome(seed: int, sharded_seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        generator.manual_seed(sharded_seed)
        return block(torch.ones(4, 32)).detach()

    assert torch.equal(outcome(1, 2), outcome(1, 2))
    assert not torch.equal(outcome(1, 2), outcome(1, 3))
    assert not torch.equal(outcome(1, 2), outcome(4, 2))


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_is_one_file_to_take_home(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert 150 <= len(text.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    others = {"numpy", "torch", "tqdm", "nemo_rng_dcp"}
    if name == "train_elastic":
        others |= {"reduction", "shards"}  # beside it, to take home too
    assert imported - others <= sys.stdlib_module_names


def test_every_recipe_is_tried() -> None:
    tried = {recipe.name for recipe in recipes.RECIPES}
    assert {path.stem for path in FOLDER.glob("train_*.py")} == tried
