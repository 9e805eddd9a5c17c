"""``StatefulRNG(logical_ranks=N)`` in one process, and as one of several in a fake group."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import (
    RNGState,
    RNGStateError,
    ScopedRNG,
    StatefulRNG,
    derive_seed,
    init_all_rng,
)
from nemo_rng_dcp.record import KEY, Record
from nemo_rng_dcp.table import records_in
from tests.support.streams import draw, unmoved, warned

FakeGroup = Callable[[int, int], None]


def by_rank(rng: StatefulRNG, draw: Callable[[], Any] = draw) -> dict[int, Any]:
    drawn = {}
    for rank in rng.ranks:
        with rng.as_rank(rank):
            drawn[rank] = draw()
    return drawn


def logical(count: int = 4, **arguments: Any) -> StatefulRNG:
    return StatefulRNG(42, ranked=True, logical_ranks=count, **arguments)


def test_each_logical_rank_is_seeded_as_the_rank_of_a_plain_job() -> None:
    expected = {}
    for rank in range(4):
        with ScopedRNG(42 + rank):
            expected[rank] = draw()
    rng = logical()
    assert (rng.ranks, rng.rank, rng.logical_ranks) == (range(4), 0, 4)
    assert by_rank(rng) == expected


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_process_plays_as_many_ranks_as_the_others(fake_group: FakeGroup, size: int) -> None:
    fingerprints = []
    for rank in range(size):
        fake_group(rank, size)
        generators = {"noise": np.random.default_rng(rank), "other": random.Random(rank)}
        rng = logical(8, generators=generators)
        assert rng.ranks == range(rank * 8 // size, (rank + 1) * 8 // size)
        fingerprints += by_rank(rng, rng.fingerprint).values()
    fake_group(0, 1)
    generators = {"noise": np.random.default_rng(5), "other": random.Random(5)}
    one = logical(8, generators=generators)
    assert fingerprints == list(by_rank(one, one.fingerprint).values())
    digits = [digit for of_rank in fingerprints for digit in of_rank.values()]
    assert len(set(digits)) == len(digits), "two ranks or generators draw alike"


def test_ranks_of_a_mesh(fake_group: FakeGroup) -> None:
    for rank, ranks in enumerate([range(4), range(4), range(4, 8), range(4, 8)]):
        fake_group(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        assert logical(8, mesh=mesh["dp"]).ranks == ranks


def test_a_number_of_processes_that_does_not_divide_is_refused(fake_group: FakeGroup) -> None:
    fake_group(0, 4)
    before = r"^logical_ranks=6 cannot be shared out evenly among 4 processes: start 1, 2, 3, 6 of "
    with unmoved(), pytest.raises(ValueError, match=before):
        logical(6)
    with unmoved(), pytest.raises(ValueError, match="among 4 processes: start 1, 2 of them"):
        logical(2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    expected = r"among 2 coordinates of the mesh \(dp 2\): start 1, 3 of them"
    with unmoved(), pytest.raises(ValueError, match=expected):
        logical(3, mesh=mesh["dp"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logical_ranks": 4}, ValueError, "logical_ranks=4 needs ranked=True"),
        ({"logical_ranks": 0, "ranked": True}, ValueError, "is 0, expected at least 1"),
        ({"logical_ranks": "4", "ranked": True}, TypeError, r"is '4' \(str\), expected an integer"),
        ({"logical_ranks": True, "ranked": True}, TypeError, r"is True \(bool\)"),
        ({"logical_ranks": 2**31, "ranked": True, "seed": 2**31 + 9}, ValueError, "adds 21474836"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_seeded(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with unmoved(), pytest.raises(error, match=message):
        StatefulRNG(**{"seed": 1, **arguments})


def test_a_job_may_have_one_logical_rank() -> None:
    assert logical(1).ranks == range(1)


def test_without_a_group_torchrun_must_have_started_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        unmoved(),
        pytest.raises(RuntimeError, match=r"one of 2 \(WORLD_SIZE\).* after init_process_group$"),
    ):
        logical()


def test_a_group_that_comes_later_is_told(fake_group: FakeGroup) -> None:
    rng = logical(global_generators=False, generators={"noise": random.Random(1)})
    fake_group(1, 2)
    message = "was seeded for rows 0 to 3, but the process has rows 2 to 3"
    with pytest.raises(RuntimeError, match=message):
        rng.state_dict()


def test_in_a_plain_job_as_rank_changes_nothing(fake_group: FakeGroup) -> None:
    fake_group(3, 4)
    rng = StatefulRNG(42, ranked=True)
    assert (rng.ranks, rng.rank, rng.logical_ranks) == (range(3, 4), 3, None)
    with ScopedRNG(45):
        expected = draw(2)
    with ScopedRNG(1), rng.as_rank(3):
        draw()
    with rng.as_rank(3):
        rng.load_state_dict(rng.state_dict())
        assert draw() + draw() == expected
        rng.rewind()
        assert draw() + draw() == expected
    with pytest.raises(ValueError, match="this process plays rank 3, no other"):
        rng.as_rank(2).__enter__()


def test_a_rewind_is_of_all_ranks_and_not_from_inside_of_one() -> None:
    rng = logical()
    by_rank(rng)
    rng.load_state_dict({KEY: rng.state_dict()[KEY].clone()})
    expected = by_rank(rng)
    message = r"rewind\(\) inside as_rank\(2\) would put back the streams of ranks 0 to 3, all of"
    with pytest.raises(RuntimeError, match=message):
        by_rank_2(rng)
    by_rank(rng)  # a validation inside of each
    rng.rewind()
    assert by_rank(rng) == expected
    assert rng.loaded is not None


def test_of_two_ranks_too_a_rewind_and_one_ranks_state_need_their_place() -> None:
    rng = logical(2)
    rng.load_state_dict({KEY: rng.state_dict()[KEY].clone()})
    with rng.as_rank(1), unmoved(), pytest.raises(RuntimeError, match="would put back"):
        rng.rewind()
    state = RNGState(random.getstate(), np.random.get_state(), torch.get_rng_state(), [])
    with unmoved(), pytest.raises(RNGStateError, match="process plays ranks 0 to 1: load it in"):
        rng.load_state_dict(state)


def test_a_registered_generator_starts_from_64_bits_of_seed_rank_and_name() -> None:
    own = random.Random()
    rng = logical(generators={"own": own})
    expected = {
        rank: random.Random(derive_seed(42, "logical rank", rank, "own", bits=64)).random()
        for rank in rng.ranks
    }
    assert by_rank(rng, own.random) == expected


def by_rank_2(rng: StatefulRNG) -> None:
    with rng.as_rank(2):
        rng.rewind()


def test_the_first_forward_rewinds_all_ranks() -> None:
    rng = logical()
    rng.load_state_dict({KEY: rng.state_dict()[KEY].clone()})
    model = torch.nn.Dropout()
    saved = {KEY: rng.state_dict()[KEY].clone()}
    expected = by_rank(rng, lambda: model(torch.ones(8)).tolist())
    rng.load_state_dict(saved)
    by_rank(rng)  # whatever draws first
    rng.rewind_at_first_forward(model)
    assert by_rank(rng, lambda: model(torch.ones(8)).tolist()) == expected


def test_a_save_and_a_load_inside_of_a_rank_are_of_all() -> None:
    rng = logical()
    with rng.as_rank(3):
        draw(2)
        inside = {KEY: rng.state_dict()[KEY].clone()}
        rest = draw()
    expected = by_rank(rng)
    with rng.as_rank(1):
        rng.load_state_dict(inside)
        assert draw() == expected.pop(1)
    assert by_rank(rng) == {**expected, 3: rest, 1: expected_next(43, 1)}


def expected_next(seed: int, drawn: int) -> list[float]:
    with ScopedRNG(seed):
        return draw(drawn + 1)[6 * drawn :]


def test_a_damaged_row_moves_no_rank() -> None:
    rng = logical()
    table = rng.state_dict()[KEY].clone()
    records = records_in(table)
    records[2][700] ^= 1
    draw()
    by_rank(rng)
    with rng.as_rank(1):
        before = rng.fingerprint(gather=True)
        with pytest.raises(RNGStateError, match="by its head row 2 of 4, does not fit its check"):
            rng.load_state_dict({KEY: table})
        assert rng.fingerprint(gather=True) == before
    record = Record.from_tensor(records[3])
    streams = {**record.streams}
    streams["torch"] = streams["torch"]._replace(state=bytes(5056))
    bad = Record(3, 4, 1, 42, True, 0, record.taken_at, None, streams).to_tensor()
    records[2][700] ^= 1
    with pytest.raises(RNGStateError, match=r"^row 3: torch: torch refuses the state"):
        rng.load_state_dict({KEY: torch.cat([*records[:3], bad])})
    assert rng.fingerprint(gather=True) == before


def test_fingerprints_are_the_current_ranks_and_of_all_rows() -> None:
    rng = logical()
    every = rng.fingerprint(gather=True)
    assert list(by_rank(rng, rng.fingerprint).values()) == every
    assert len({digits["torch"] for digits in every}) == 4
    rng.verify_shared()


def test_a_shared_generator_that_one_rank_alone_has_drawn_from_is_found() -> None:
    shared = np.random.default_rng(1)
    rng = logical(shared_generators={"shuffle": shared})
    with rng.as_rank(2):
        shared.random()
    message = "^shuffle: all ranks share it, but rank 2 differs from rank 0"
    with pytest.raises(RNGStateError, match=message):
        rng.verify_shared()


def test_draws_outside_are_told_once_at_the_next_save() -> None:
    rng = logical()
    by_rank(rng)
    assert warned(rng.state_dict) == []
    random.random()
    [message] = warned(rng.state_dict)
    assert message.startswith("rank 0: python drawn from outside of as_rank() since the last load")
    assert warned(rng.state_dict) == []
    torch.rand(1)
    rng.load_state_dict({KEY: rng.state_dict()[KEY].clone()})
    assert warned(rng.state_dict) == []


def test_ranked_seeds_inside_of_a_rank_are_the_logical_ranks() -> None:
    rng = logical()
    expected = {rank: expected_next(7 + rank, 0) for rank in range(4)}

    def in_a_scope() -> list[float]:
        with ScopedRNG(7, ranked=True):
            return draw()

    assert by_rank(rng, in_a_scope) == expected
    assert in_a_scope() == expected[0]
    with rng.as_rank(2):
        init_all_rng(7, ranked=True)
        assert draw() == expected[2]
    StatefulRNG(1, ranked=True)
    assert in_a_scope() == expected[0]


def test_ranked_seeds_are_those_of_whoever_has_the_global_generators() -> None:
    rng, others = logical(), logical(global_generators=False, generators={"g": torch.Generator()})
    expected = expected_next(7 + 2, 0)
    with rng.as_rank(2), others.as_rank(1), ScopedRNG(7, ranked=True):
        assert draw() == expected


def test_a_state_of_automodel_is_loaded_inside_of_its_rank() -> None:
    rng = logical()
    state = RNGState(random.getstate(), np.random.get_state(), torch.get_rng_state(), [])
    expected = draw()
    with unmoved(), pytest.raises(RNGStateError, match=r"process plays ranks 0 to 3: load it in"):
        rng.load_state_dict(state)
    with rng.as_rank(2):
        rng.load_state_dict(state)
    drawn = by_rank(rng)
    assert drawn[2] == expected
    assert drawn[1] == expected_next(43, 0)


def test_a_load_repairs_shared_streams_that_are_apart(tmp_path: Path) -> None:
    order = torch.Generator().manual_seed(3)
    rng = StatefulRNG(1, ranked=True, logical_ranks=4, shared_generators={"order": order})
    rng.save(tmp_path)
    expected = torch.rand(3, generator=order)
    dcp.save({"rng": rng}, checkpoint_id=tmp_path / "all", no_dist=True)
    loads: list[Callable[[], None]] = [
        lambda: rng.load(tmp_path),
        lambda: dcp.load({"rng": rng}, checkpoint_id=tmp_path / "all", no_dist=True),
    ]
    rng.load(tmp_path)
    for load in loads:
        with rng.as_rank(1):
            torch.rand(1, generator=order)
        torch.rand(1, generator=order)
        with pytest.raises(RNGStateError, match="order: all ranks share it"):
            rng.state_dict()
        load()
        rng.state_dict()
    rng.load(tmp_path)
    assert torch.equal(torch.rand(3, generator=order), expected)
