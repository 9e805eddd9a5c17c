"""Megatron-Core's tracker, with states of the CPU: what it draws without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import RNGLoadPlanner, init_all_rng
from tests.frameworks.training import run_page
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

NAMES = "data-parallel-rng", "model-parallel-rng", "expert-parallel-rng"


def set_up(tp: int, ep: int, seed: int) -> dict[str, Any]:
    """Seed as Megatron-LM does without CUDA, and the tracker as its ``add()`` does with it."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    rank = dist.get_rank()
    init_all_rng(seed)  # pp is 1
    seeds = seed, seed + 2718 + rank % tp, seed + 1024 + 100 * (rank % ep)
    states = [torch.Generator().manual_seed(number).get_state() for number in seeds]
    get_cuda_rng_tracker().set_states(dict(zip(NAMES, states, strict=True)))
    size = dist.get_world_size()
    sizes = {"pp": 1, "dp": size // tp, "tp": tp, "edp": size // ep, "ep": ep, "etp": 1}
    return {"dcp": dcp, "RNGLoadPlanner": RNGLoadPlanner, **sizes}


def draw_from(tracker: Any, name: str) -> list[float]:
    states = tracker.get_states()
    generator = torch.Generator()
    generator.set_state(states[name])
    drawn: list[float] = torch.randn(2, generator=generator).tolist()
    tracker.set_states({**states, name: generator.get_state()})
    return drawn


def run(path: Path, tp: int, ep: int, resume: bool, along_meshes: bool) -> list[list[float]]:
    names = {**set_up(tp, ep, 77 if resume else 5), "path": str(path)}
    run_page("megatron", 0, names)
    tracker = names["tracker"]
    for name in NAMES:
        draw_from(tracker, name)
    if along_meshes:
        # The block that makes the entries also saves them, here where nothing is read.
        entries = names | {"path": f"{path}-unread"} if resume else names
        run_page("megatron", 3, entries)
        if resume:
            run_page("megatron", 4, entries | {"path": str(path)})
    else:
        run_page("megatron", 2 if resume else 1, names)
    return [draw(), *(draw_from(tracker, name) for name in NAMES)]


def test_the_tracker_joins_with_one_call(tmp_path: Path) -> None:
    expected = job(4, run, tmp_path, 2, 2, False, False)
    assert expected[0] != expected[1]
    assert job(4, run, tmp_path, 2, 2, True, False) == expected


@pytest.mark.parametrize(("size", "tp", "ep"), [(4, 2, 2), (4, 1, 4), (2, 2, 1), (3, 3, 3)])
def test_each_stream_goes_along_its_mesh(size: int, tp: int, ep: int, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    before = job(4, run, path, 2, 2, False, True)
    after = job(size, run, path, tp, ep, True, True)
    for rank, (streams, data, model, expert) in enumerate(after):
        assert [streams, data] == before[0][:2], "alike on all ranks of a pipeline stage"
        if rank % tp < 2:
            assert model == before[rank % tp][2]
        if rank % ep < 2:
            assert expert == before[rank % ep][3]
    models = {rank % tp: model for rank, (_, _, model, _) in enumerate(after)}
    experts = {rank % ep: expert for rank, (*_, expert) in enumerate(after)}
    assert len({str(model) for model in models.values()}) == tp, "a new coordinate forks"
    assert len({str(expert) for expert in experts.values()}) == ep
    for rank, (_, _, model, expert) in enumerate(after):
        assert (model, expert) == (models[rank % tp], experts[rank % ep]), "peers draw alike"
