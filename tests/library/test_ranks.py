"""What ranks say of one another's streams: every rank, every row, every generator."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGStateError, StatefulRNG
from nemo_rng_dcp.generators import GeneratorSet, own_device
from tests.support.jobs import gather, job
from tests.support.streams import unmoved


def fingerprints_of_all() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    own = {"own": random.Random(dist.get_rank() + 50)}
    rng = StatefulRNG(42, ranked=True, generators=own)
    with unmoved():
        return rng.fingerprint(gather=True), gather(rng.fingerprint())


def test_fingerprints_are_gathered_by_row_for_every_generator() -> None:
    for gathered, expected in job(3, fingerprints_of_all):
        assert gathered == expected
    names = [*GeneratorSet(own_device()).slots, "own"]
    assert [list(of_row) for of_row in expected] == [names] * 3
    digits = [text for of_row in expected for text in of_row.values()]
    assert len(set(digits)) == 3 * len(names)
    assert {len(text) for text in digits} == {12}


def fingerprints_of_shared_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    rng = StatefulRNG(42, ranked=True, mesh=mesh["dp"])  # ranks 0 and 2 have row 0
    if dist.get_rank() == 2:
        torch.rand(1)
    return rng.fingerprint(gather=True), gather(rng.fingerprint())


def test_the_lowest_rank_of_a_row_gives_its_fingerprint() -> None:
    for gathered, by_rank in job(4, fingerprints_of_shared_rows):
        assert gathered == by_rank[:2]
    assert by_rank[0] != by_rank[2]
    assert by_rank[1] == by_rank[3]


def drift() -> list[str]:
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("tp", "dp"))
    order, other = random.Random(1), random.Random(2)
    rng = StatefulRNG(
        42, ranked=True, mesh=mesh["dp"], shared_generators={"order": order, "other": other}
    )
    rng.verify_shared()
    rank = dist.get_rank()
    if rank in (3, 5):  # of ranks 1, 3 and 5, which share row 1
        np.random.random()
    if rank == 4:  # of ranks 0, 2 and 4
        torch.rand(1)
    if rank in (1, 2):
        other.random()
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    return str(caught.value).split(". ")[0].split("; ")


def drift_where_all_are_alike() -> str:
    rng = StatefulRNG(42, generators={"own": random.Random(dist.get_rank())})
    rng.verify_shared()
    if dist.get_rank() == 1:
        random.random()
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    return str(caught.value).split(". ")[0]


def test_without_ranked_all_ranks_share_the_global_streams() -> None:
    message = "python: all ranks share it, but rank 1 differs from rank 0"
    assert job(2, drift_where_all_are_alike) == [message] * 2


def test_every_drift_of_every_generator_row_and_peer_is_named() -> None:
    for messages in job(6, drift):
        assert messages == [
            "numpy: ranks 1, 3, 5 share row 1, but rank 3, 5 differs from rank 1",
            "torch: ranks 0, 2, 4 share row 0, but rank 4 differs from rank 0",
            "other: all ranks share it, but rank 1, 2 differs from rank 0",
        ]
