"""The page for frameworks that are not listed: its snippets, saved on 2 ranks and resumed."""

import copy
import pickle
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG, init_all_rng
from tests.support.jobs import job
from tests.support.streams import draw

PAGE = Path(__file__).parents[2] / "docs" / "frameworks" / "other.md"

ADOPT = "It seeds by itself"
SAVED = [
    "A dict for dcp.save",
    "A storage writer of its own",
    "No DCP, or not on all ranks",
    "The deprecated save_state_dict",
]


def snippets(heading: str) -> list[str]:
    """Return the Python of a section of the page."""
    [section] = re.findall(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S
    )
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def run(text: str, names: dict[str, Any]) -> None:
    exec(compile(text, str(PAGE), "exec"), names)


def names_for(path: Path) -> dict[str, Any]:
    """What a framework has when its snippets run, its seeding included."""
    from torch.distributed._shard.checkpoint import load_state_dict, save_state_dict

    init_all_rng(5, ranked=True)
    path.mkdir(exist_ok=True)
    names: dict[str, Any] = {
        "dcp": dcp,
        "dist": dist,
        "torch": torch,
        "RNGLoadPlanner": RNGLoadPlanner,
        "FileSystemReader": FileSystemReader,
        "FileSystemWriter": FileSystemWriter,
        "save_state_dict": save_state_dict,
        "load_state_dict": load_state_dict,
        "writer": FileSystemWriter(path),
        "reader": FileSystemReader(path),
        "state": {"weight": torch.ones(3)},
        "path": str(path),
    }
    run(snippets(ADOPT)[0], names)
    return names


def save(heading: str, path: Path) -> list[float]:
    names = names_for(path)
    draw(2)
    run(snippets(heading)[0], names)
    dist.barrier()
    return draw()


def load(heading: str, path: Path) -> list[float]:
    names = names_for(path)
    draw(3)
    names["state"]["weight"].zero_()
    run(snippets(heading)[1], names)
    assert torch.equal(names["state"]["weight"], torch.ones(3))
    return draw()


def assert_elastic(expected: list[list[float]], resumed: dict[int, list[list[float]]]) -> None:
    assert expected[0] != expected[1]
    assert resumed[2] == expected
    assert resumed[1] == expected[:1]
    assert resumed[3][:2] == expected
    assert resumed[3][2] not in expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heading", SAVED)
def test_each_section_resumes_on_other_numbers_of_ranks(heading: str, tmp_path: Path) -> None:
    path = tmp_path / "step-7"
    expected = job(2, save, heading, path)
    assert_elastic(expected, {size: job(size, load, heading, path) for size in (2, 1, 3)})


def save_in_a_hook(path: Path) -> list[float]:
    names = names_for(path)
    begin, hook = snippets("Asynchronous")
    run(begin, names)
    expected = draw()  # the steps until the checkpoint is complete
    run(hook, names)
    return expected


def load_beside(path: Path) -> list[float]:
    rng = StatefulRNG(1, ranked=True)
    rng.load(path / "rng")
    return draw()


def test_a_hook_stores_the_moment_at_which_the_save_began(tmp_path: Path) -> None:
    expected = job(2, save_in_a_hook, tmp_path)
    assert_elastic(expected, {size: job(size, load_beside, tmp_path) for size in (2, 1, 3)})


@dataclass
class RandomState:
    """The fields of nanotron's, of which ``torch_cuda`` is ``None`` on a CPU."""

    random: Any
    numpy: Any
    torch_cpu: Any
    torch_cuda: Any


def current() -> RandomState:
    return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), None)


@contextmanager
def branch(states: dict[str, RandomState], name: str) -> Iterator[None]:
    outside = current()
    for state in (states[name], outside):
        random.setstate(state.random)
        np.random.set_state(state.numpy)
        torch.set_rng_state(state.torch_cpu)
        if state is not outside:
            yield
            states[name].__dict__.update(vars(current()))


def kept(path: Path, resume: bool) -> list[list[float]]:
    init_all_rng(5, ranked=True)
    names: dict[str, Any] = {"random_states": {"tp_synced": current()}}
    draw(1)
    [text] = snippets("States that are kept by name")
    run(text, names)
    with branch(names["random_states"], "tp_synced"):
        draw(2 + resume)
    rng = names["rng"]
    if resume:
        rng.load(path)
    else:
        rng.save(path)
    with branch(names["random_states"], "tp_synced"):
        inside = draw()
    return [inside, draw()]


def test_states_that_are_kept_by_name_come_back(tmp_path: Path) -> None:
    expected = job(2, kept, tmp_path, False)
    assert expected[0][0] != expected[0][1]
    assert job(2, kept, tmp_path, True) == expected


def inside_a_checkpoint(path: Path, resume: bool) -> list[float]:
    state = {"weight": torch.ones(3)}
    rng = StatefulRNG(7 if resume else 42, ranked=True)
    if resume:
        dcp.load(state, checkpoint_id=path)
        rng.load(path / "rng")
    else:
        dcp.save(state, checkpoint_id=path)
        rng.save(path / "rng")
    return draw()


def test_the_subfolder_may_lie_in_a_dcp_checkpoint(tmp_path: Path) -> None:
    expected = job(2, inside_a_checkpoint, tmp_path, False)
    assert job(2, inside_a_checkpoint, tmp_path, True) == expected


def in_one_folder(path: Path, killed: bool, resume: bool) -> None:
    """Save twice into one folder, the second time as a kill between the two saves leaves it."""

    def save_model(state: dict[str, Any], folder: str) -> None:
        if dist.get_rank() == 0 and not (killed and rng.loaded is not None):
            torch.save(state, f"{folder}/model.pt")

    saving, loading = snippets("Inside or beside?")
    names = names_for(path)
    rng = names["rng"]
    names |= {"save": save_model, "load": lambda folder: torch.load(f"{folder}/model.pt")}
    if not resume:
        run(saving, names)
        rng.load(path / "rng")
        draw()
        run(saving, names)
        return
    draw()
    if killed:
        with pytest.raises(RuntimeError, match="of two steps"):
            run(loading, names)
    else:
        run(loading, names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("killed", [False, True])
def test_a_model_and_a_record_of_two_steps_are_told_apart(killed: bool, tmp_path: Path) -> None:
    job(2, in_one_folder, tmp_path, killed, False)
    for size in (2, 1, 3):
        job(size, in_one_folder, tmp_path, killed, True)


def by_one_replica(path: Path, resume: bool) -> tuple[list[float], str]:
    """The first replica of HSDP saves the model alone, and all ranks the record."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    state: dict[str, Any] = {"weight": torch.ones(3)}
    rng = StatefulRNG(7 if resume else 42, ranked=True)
    error = ""
    if resume:
        dcp.load(state, checkpoint_id=path)
        rng.load(path / "rng")
    else:
        if mesh.get_local_rank("replicate") == 0:
            replica = mesh["shard"].get_group()
            with pytest.raises(CheckpointException) as caught:
                dcp.save({**state, "rng": rng}, checkpoint_id=path / "no", process_group=replica)
            error = str(caught.value)
            dcp.save(state, checkpoint_id=path, process_group=replica)
        rng.save(path / "rng")
    return draw(), error


def test_one_replica_saves_the_model_and_all_ranks_the_record(tmp_path: Path) -> None:
    """DCP's message is that of the table of errors."""
    saved = job(4, by_one_replica, tmp_path, False)
    assert all("Failed to validate global plan" in error for _, error in saved[:2])
    expected = [drawn for drawn, _ in saved]
    assert len({str(drawn) for drawn in expected}) == 4
    assert [drawn for drawn, _ in job(4, by_one_replica, tmp_path, True)] == expected


def by_a_part(path: Path) -> bool:
    """The remedy of the same error for ranks that are a job of their own: a mesh of them."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return True
    state = {"rng": StatefulRNG(42, True, mesh=DeviceMesh.from_group(group, "cpu", [0, 2]))}  # type: ignore[arg-type]
    dcp.save(state, checkpoint_id=path, process_group=group)
    expected = draw()
    dcp.load(state, checkpoint_id=path, process_group=group)
    return draw() == expected


def test_a_part_of_the_ranks_saves_along_a_mesh_of_its_own(tmp_path: Path) -> None:
    assert job(3, by_a_part, tmp_path) == [True] * 3


@dataclass
class Config:
    seed: int
    rng: StatefulRNG


def test_a_config_that_is_copied_says_to_keep_the_object_outside() -> None:
    config = Config(42, StatefulRNG(42))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="deep-copied: keep it outside"):
            copied(config)


def test_the_page_has_no_snippet_that_is_not_run() -> None:
    run_here = [ADOPT, *SAVED, "Asynchronous", "States that are kept by name", "Inside or beside?"]
    found = [text for heading in run_here for text in snippets(heading)]
    assert sorted(found) == sorted(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
