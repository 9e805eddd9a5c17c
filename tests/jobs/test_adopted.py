"""Streams that a framework has seeded, and files that it saves by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGStateError, StatefulRNG, automodel, init_all_rng
from tests.frameworks.training import run_page
from tests.support.jobs import begin_group, job
from tests.support.streams import draw, unmoved, warned


def save(path: Path, ranked: bool) -> list[float]:
    init_all_rng(5, ranked)  # the framework's own seeding
    with unmoved():
        rng = StatefulRNG(None, ranked)  # also before the process group: it belongs to no row yet
    begin_group()
    draw(2)
    rng.save(path)
    rng.verify_shared()
    return draw()


def load(path: Path, ranked: bool) -> list[float]:
    begin_group()
    init_all_rng(9, ranked)
    rng = StatefulRNG(None, ranked)
    messages = warned(lambda: rng.load(path))
    assert not any("seed" in message for message in messages)
    return draw()


@pytest.mark.parametrize("ranked", [True, False])
def test_streams_taken_without_a_seed_fork_on_new_ranks_if_ranked(
    ranked: bool, tmp_path: Path
) -> None:
    expected = job(2, save, tmp_path, ranked, group=False)
    assert (expected[0] != expected[1]) == ranked
    assert job(2, load, tmp_path, ranked, group=False) == expected
    *old, new = job(3, load, tmp_path, ranked, group=False)
    assert old == expected
    assert (new not in old) == ranked


def undeclared(path: Path) -> str:
    init_all_rng(5, ranked=True)
    with pytest.raises(RNGStateError) as caught:
        StatefulRNG(None).verify_shared()
    return str(caught.value)


def test_ranks_that_differ_without_being_declared_ranked_are_found(tmp_path: Path) -> None:
    for message in job(2, undeclared, tmp_path):
        assert "differ" in message


def by_dp_rank(path: Path, resume: bool, with_mesh: bool) -> list[float] | str:
    """Save and load as recipes do whose tensor-parallel peers share a file."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    file = path / f"rng_dp_rank_{mesh.get_local_rank('dp')}.pt"
    names: dict[str, Any] = {"mesh": mesh, "StatefulRNG": automodel.StatefulRNG}
    if with_mesh:
        run_page("automodel", 2, names)
    rng = names["rng"] if with_mesh else automodel.StatefulRNG(42, ranked=True)
    if not resume:
        if mesh.get_local_rank("tp") == 0:
            torch.save(rng.state_dict(), file)
        dist.barrier()
        return draw()
    draw()
    try:
        rng.load_state_dict(state=torch.load(file, weights_only=True))
    except RNGStateError as error:
        return str(error)
    return draw()


@pytest.mark.parametrize("with_mesh", [True, False])
def test_peers_that_load_one_file_get_its_row_or_are_told_of_the_mesh(
    with_mesh: bool, tmp_path: Path
) -> None:
    expected = job(4, by_dp_rank, tmp_path, False, with_mesh)
    found = job(4, by_dp_rank, tmp_path, True, with_mesh)
    assert found[::2] == expected[::2]
    if with_mesh:
        assert found == expected
    else:
        assert all('mesh=mesh["dp"]' in str(message) for message in found[1::2])
