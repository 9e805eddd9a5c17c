"""What a GPU has and the simulated device has not: graphs, a compiler, NCCL, a driver.

``pytest -m cuda`` runs these alone.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.checkpoint import checkpoint

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.determinism import CUBLAS_VARIABLE, environment, set_deterministic
from scripts.demo import recipes, runs
from scripts.demo.recipes import RECIPES, Job, Recipe
from tests.devices.test_accelerator_jobs import resume, train
from tests.support.devices import COUNT, TYPE
from tests.support.jobs import job
from tests.support.recipes import train_forked

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(TYPE != "cuda", reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def test_the_environment_names_gpu_and_driver() -> None:
    accelerator = environment()["accelerator"]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    assert accelerator["devices"] == names
    assert accelerator["runtime"] == torch.version.cuda
    assert re.match(r"\d+\.\d+", accelerator["driver"])


def switch_on_a_gpu_in_use() -> None:
    torch.rand(1, device="cuda")
    os.environ.pop(CUBLAS_VARIABLE, None)
    with pytest.raises(RuntimeError, match="too late"):
        set_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
    os.environ[CUBLAS_VARIABLE] = ":16:8"
    with set_deterministic():
        weights = torch.randn(64, 64, device="cuda")
        assert torch.equal(weights @ weights, weights @ weights)


def test_deterministic_algorithms_on_a_gpu_in_use() -> None:
    """In a process of its own: what cuBLAS has read is remembered for the rest of one."""
    job(1, switch_on_a_gpu_in_use, group=False)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_training_over_nccl_continues_exactly(tmp_path: Path, parallel: str) -> None:
    expected = job(COUNT, train, parallel, tmp_path, group=False)
    assert job(COUNT, resume, parallel, tmp_path, group=False) == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_killed_recipe_continues(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "train", train_forked)
    names = (*recipe.generators, "cuda")
    recipe = replace(recipe, job=Job(COUNT), resumes={}, generators=names)
    for finding in recipes.compare(recipe, tmp_path):
        assert finding.found == finding.expected, finding.compared
    streams = [
        runs.read_streams(runs.checkpoint(tmp_path / run, recipe.schedule.steps), generators=names)
        for run in ("killed", "uninterrupted")
    ]
    assert streams[0] == streams[1]


Step = Callable[[], list[float]]


def eager(own: torch.Generator) -> Step:
    """A step that draws from the GPU's stream and from a generator of its own."""
    ones = torch.ones(8, 64, device="cuda")

    def step() -> list[float]:
        noise = torch.rand(8, device="cuda", generator=own)
        return (torch.nn.functional.dropout(ones, 0.5).sum(1) + noise).tolist()

    return step


def graphed(own: torch.Generator) -> Step:
    """The same as a captured graph."""
    ones, graph = torch.ones(8, 64, device="cuda"), torch.cuda.CUDAGraph()
    graph.register_generator_state(own)
    with torch.cuda.graph(graph):
        noise = torch.rand(8, device="cuda", generator=own)
        out = torch.nn.functional.dropout(ones, 0.5).sum(1) + noise

    def step() -> list[float]:
        graph.replay()
        return out.tolist()

    return step


def compiled(own: torch.Generator) -> Step:
    """Dropout in a kernel that torch.compile makes at the first step."""
    ones = torch.ones(8, 64, device="cuda")
    dropped = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5).sum(1))

    def step() -> list[float]:
        noise = torch.rand(8, device="cuda", generator=own)
        return (dropped(ones) + noise).tolist()

    return step


def recomputed(own: torch.Generator) -> Step:
    """Dropout that the backward pass runs again, from a stream put back."""

    def step() -> list[float]:
        x = torch.ones(8, 64, device="cuda", requires_grad=True)
        y = checkpoint(lambda x: torch.nn.functional.dropout(x, 0.5).exp(), x, use_reentrant=False)
        y.sum().backward()
        assert x.grad is not None
        noise = torch.rand(8, device="cuda", generator=own)
        return (x.grad.sum(1) + noise).tolist()

    return step


def begin(make_step: Callable[[torch.Generator], Step], path: Path) -> list[list[float]]:
    own = torch.Generator("cuda").manual_seed(3)
    rng, step = StatefulRNG(1, generators={"own": own}), make_step(own)
    before = [step() for _ in range(3)]
    dcp.save({"rng": rng}, checkpoint_id=path)
    expected = [step() for _ in range(3)]
    dcp.load({"rng": rng}, checkpoint_id=path)
    again = [step() for _ in range(3)]
    assert again == expected, "in the same process"
    assert len({str(numbers) for numbers in [*before, *expected]}) == 6
    return expected


def go_on(make_step: Callable[[torch.Generator], Step], path: Path) -> list[list[float]]:
    own = torch.Generator("cuda").manual_seed(4)
    rng, step = StatefulRNG(2, generators={"own": own}), make_step(own)
    dcp.load({"rng": rng}, checkpoint_id=path)
    return [step() for _ in range(3)]


@pytest.mark.parametrize("make_step", [eager, graphed, compiled, recomputed])
def test_steps_continue_exactly(
    make_step: Callable[[torch.Generator], Step], tmp_path: Path
) -> None:
    expected = job(1, begin, make_step, tmp_path)
    assert job(1, go_on, make_step, tmp_path) == expected
