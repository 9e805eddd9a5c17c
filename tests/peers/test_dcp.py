"""torch's own helpers for tests of DCP, with ``RNGLoadPlanner`` around the default planner."""

import unittest
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.checkpoint_utils import (
    Rot13Example,
    get_test_extension_registry,
)
from torch.testing._internal.distributed.common_state_dict import VerifyStateDictMixin

from nemo_rng_dcp import RNGLoadPlanner, ScopedRNG, StatefulRNG
from tests.support.jobs import JobError, job
from tests.support.streams import draw

pytestmark = pytest.mark.peers


class Verify(VerifyStateDictMixin, unittest.TestCase):
    """torch's comparison of a sharded state with one that is not."""


def make(sharded: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    with ScopedRNG(3):
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    if sharded:
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5 + number)
    optimizer.step()


def resume(path: Path, loads: bool) -> None:
    rng = StatefulRNG(42, ranked=True)
    model, optimizer = make(sharded=True)
    step(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    draw()
    # The bytes of the file are turned by torch's example of an extension.
    writer = FileSystemWriter(path, _extensions=[Rot13Example()])
    dcp.save({"model": weights, "optimizer": moments, "rng": rng}, storage_writer=writer)
    expected = draw()

    model, optimizer = make(sharded=True)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "rng": StatefulRNG(7, ranked=True)}
    reader = FileSystemReader(path, _extension_registry=get_test_extension_registry())
    if loads:
        dcp.load(state, storage_reader=reader, planner=RNGLoadPlanner())
        assert draw() == expected
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    plain, plain_optimizer = make(sharded=False)
    step(plain, plain_optimizer)
    weights, moments = get_state_dict(model, optimizer)
    Verify()._verify_msd(plain.state_dict(), weights)
    Verify()._verify_osd(plain, plain_optimizer, plain_optimizer.state_dict(), moments)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("size", [1, 2])
def test_what_torch_verifies_comes_back_beside_the_streams(size: int, tmp_path: Path) -> None:
    job(size, resume, tmp_path, True)


def test_a_load_that_is_left_out_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="has mismatched value"):
        job(2, resume, tmp_path, False)
