"""What ranks say of one another's streams: every rank, every row, every generator."""

import random
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_rng_dcp import RNGStateError, StatefulRNG
from nemo_rng_dcp.generators import GeneratorSet, own_device
from tests.support.jobs import begin_group, gather, job
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


# Ranks that differ in more than a stream.


def other_order() -> int:
    names = ["a", "b"] if dist.get_rank() else ["b", "a"]
    rng = StatefulRNG(42, shared_generators={name: random.Random(name) for name in names})
    rng.verify_shared()
    return len(rng.fingerprint(gather=True))


def test_generators_are_compared_by_name() -> None:
    assert job(2, other_order) == [2, 2]


def errors_of(rng: StatefulRNG) -> list[str]:
    texts = []
    for call in (rng.verify_shared, lambda: rng.fingerprint(gather=True)):
        with unmoved(), pytest.raises(RNGStateError) as caught:
            call()  # type: ignore[operator]
        texts.append(str(caught.value))
    return texts


def other_names() -> list[str]:
    names = ["a", "b", "c"] if dist.get_rank() == 1 else ["a", "d"]
    return errors_of(StatefulRNG(42, generators={name: random.Random(1) for name in names}))


def test_ranks_with_other_generators_are_named_on_every_rank() -> None:
    for texts in job(3, other_names):
        for text in texts:
            assert "b: rank 1 has this generator and rank 0 has not" in text
            assert "c: rank 1 has this generator and rank 0 has not" in text
            assert "d: rank 0 has this generator and rank 1 has not" in text


def cannot_be_stored() -> list[str]:
    rng = StatefulRNG(42)
    if dist.get_rank() == 1:
        np.random.set_bit_generator(np.random.PCG64(1))
    own = {"rank": dist.get_rank()}
    texts = []
    for call in (rng.verify_shared, lambda: rng.fingerprint(gather=True)):
        with pytest.raises(RNGStateError) as caught:
            call()  # type: ignore[operator]
        texts.append(str(caught.value))
    assert gather(own) == [{"rank": 0}, {"rank": 1}], "the group can be used afterwards"
    return texts


def test_a_rank_that_cannot_tell_its_streams_is_named_on_every_rank() -> None:
    for texts in job(2, cannot_be_stored):
        for text in texts:
            assert text.startswith("rank 1 cannot tell its streams: numpy: ")


def by_some_ranks() -> list[str]:
    rank = dist.get_rank()
    group = dist.new_group([0, 2])
    mesh = DeviceMesh.from_group(group, "cpu", [0, 2]) if rank != 1 else None
    rng = StatefulRNG(42, ranked=True, mesh=mesh)
    if rank == 1:
        with pytest.raises(ValueError, match="rank 1 is not in the process_group") as caught:
            rng.verify_shared(process_group=group)
        return [str(caught.value)]
    rng.verify_shared(process_group=group)
    rows = rng.fingerprint(gather=True, process_group=group)
    assert rows[rank // 2] == rng.fingerprint()
    return [row["python"] for row in rows]


def test_some_ranks_may_ask_one_another() -> None:
    first, _, third = job(3, by_some_ranks)
    assert first == third
    assert len(set(first)) == 2


def without_the_others() -> str:
    begin_group(limit=2)
    group = dist.new_group([0, 2], timeout=timedelta(seconds=2))
    if dist.get_rank() != 0:
        return ""  # a rank of a job ends when all have returned
    rng = StatefulRNG(42)
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.verify_shared(process_group=group)
    return str(caught.value)


def test_ranks_that_do_not_call_it_end_in_an_error_that_says_so() -> None:
    text, *_ = job(3, without_the_others, group=False)
    assert "rank 0: not all of ranks 0, 2 answered" in text
    assert "process_group=" in text
