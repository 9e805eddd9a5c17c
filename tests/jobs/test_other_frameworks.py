"""The page for frameworks that are not listed: its snippets, saved on 2 ranks and resumed."""

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


def test_the_page_has_no_snippet_that_is_not_run() -> None:
    run_here = [ADOPT, *SAVED, "Asynchronous", "States that are kept by name"]
    found = [text for heading in run_here for text in snippets(heading)]
    assert sorted(found) == sorted(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
