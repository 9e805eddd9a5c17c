"""The rules of a resume: what is restored, forked or dropped, and what is warned of."""

import dataclasses
import math
import platform
import random
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_rng_dcp import RNGStateError, RNGStateWarning, StatefulRNG
from nemo_rng_dcp.generators import Slot
from nemo_rng_dcp.record import KEY, Mesh, Record, Stream
from nemo_rng_dcp.resume import Job, fork_seed, resume
from nemo_rng_dcp.versions import version_number, version_text
from tests.support.records import State, altered, record_of
from tests.support.streams import draw, unmoved

pytestmark = pytest.mark.filterwarnings("ignore::nemo_rng_dcp.RNGStateWarning")


def head(rng: StatefulRNG) -> tuple[int, bool, int]:
    record = record_of(rng.state_dict())
    return record.seed, record.ranked, record.resizes


def of_two_rows(state: State, **fields: object) -> State:
    return altered(state, rows=2, **fields)


@pytest.mark.parametrize("ranked", [False, True])
def test_the_seed_and_ranked_are_those_of_the_job_that_saves(ranked: bool) -> None:
    saved = StatefulRNG(5, ranked=not ranked).state_dict()
    rng = StatefulRNG(6, ranked=ranked)
    rng.load_state_dict(saved)
    assert head(rng) == (6, ranked, 0)


def test_resizes_are_those_of_the_checkpoint_that_was_loaded_last() -> None:
    """Also when an older checkpoint is loaded after a newer one."""
    rng = StatefulRNG(5)
    state = rng.state_dict()
    draw()
    for saved, expected in (
        (altered(state, resizes=3), 3),  # as many rows
        (of_two_rows(state, resizes=3), 4),
        (of_two_rows(state, resizes=0), 1),
        (altered(state, resizes=0), 0),
    ):
        rng.load_state_dict(saved)
        assert head(rng)[2] == expected


def test_a_load_that_failed_changes_nothing_that_is_remembered() -> None:
    rng = StatefulRNG(5)
    first = rng.state_dict()
    expected = draw()
    rng.load_state_dict(of_two_rows(first, resizes=7))
    draw(2)
    with unmoved(), pytest.raises(RNGStateError):
        rng.load_state_dict(of_two_rows(first, row=1, resizes=20))
    assert head(rng)[2] == 8
    rng.rewind()
    assert draw() == expected, "rewind() goes to the last load that succeeded"


def test_the_times_of_records_grow_and_the_world_is_counted(
    fake_group: Callable[[int, int], None],
) -> None:
    fake_group(1, 3)
    rng = StatefulRNG(5)
    first, second = record_of(rng.state_dict()), record_of(rng.state_dict())
    assert (first.row, first.rows, first.world_size) == (1, 3, 3)
    assert first.taken_at < second.taken_at


# Versions, in both directions.

NOW = {
    "python": platform.python_version(),
    "numpy": np.__version__,
    "torch": str(torch.__version__),
}


@pytest.mark.parametrize("step", [-1_000_000, -1_000, -1, 1, 1_000, 1_000_000])
@pytest.mark.parametrize("name", NOW)
def test_each_other_version_is_named_older_or_newer(name: str, step: int) -> None:
    rng = StatefulRNG(1)
    then = version_number(NOW[name]) + step
    state = altered(rng.state_dict(), **{f"{name}_version": then})
    with pytest.warns(RNGStateWarning) as caught:
        rng.load_state_dict(state)
    here = version_text(version_number(NOW[name]))
    [text] = [str(warning.message) for warning in caught]
    assert f"saved with {name} {version_text(then)}, now {here}: the streams continue" in text


# What is said of rows, generators and meshes.


def of(rows: int, mesh: Mesh | None, *names: str) -> Record:
    streams = {name: Stream("python", False, name.encode()) for name in names}
    return Record(0, rows, rows, 1, True, 0, 1, mesh, streams)


def job(rows: int, mesh: Mesh | None, *names: str) -> Job:
    slots = {name: Slot("python", False, True) for name in names}
    return Job(0, rows, mesh, True, slots)


@pytest.mark.parametrize(
    ("then", "now", "remark"),
    [
        (3, 2, "3 rows were saved and 2 are loaded: row 2 is dropped"),
        (4, 2, "4 rows were saved and 2 are loaded: rows 2 to 3 are dropped"),
        (2, 3, "2 rows were saved and 3 are loaded: row 2 is new, row 2 from row 0 (a, b for"),
        (
            2,
            5,
            "2 rows were saved and 5 are loaded: rows 2 to 4 are new, row 2 from row 0, row 3 "
            "from row 1, ... (",
        ),
    ],
)
def test_rows_are_counted_in_words(then: int, now: int, remark: str) -> None:
    plan = resume(of(then, None, "a", "b"), job(now, None, "a", "b"))
    assert plan.resizes == 1
    [text] = plan.remarks
    assert text.startswith(remark)


def test_all_that_only_one_side_has_is_named() -> None:
    there = job(1, None, "c", "d", "e", "of.d", "of.d.seed_seq")
    plan = resume(of(1, None, "a", "b", "c"), there)
    assert (plan.states, plan.resizes) == ({"c": b"c"}, 0)
    absent, ignored = plan.remarks
    assert "the checkpoint has no d, e, of.d: the stream stays as it is" in absent
    assert "the checkpoint has a, b, which this job does not have: ignored" in ignored


@pytest.mark.parametrize("then", [(("a", 2), ("b", 3)), (("a", 3), ("b", 2)), (("c", 6),), None])
@pytest.mark.parametrize("now", [(("b", 3), ("a", 2)), (("b", 2), ("a", 3)), (("a", 6),)])
def test_a_permuted_or_renamed_mesh_warns(then: Mesh | None, now: Mesh | None) -> None:
    plan = resume(of(6, then, "a"), job(6, now, "a"))
    assert any("row r may belong to another coordinate now" in text for text in plan.remarks)


@pytest.mark.parametrize(
    ("then", "now", "renumbered"),
    [
        ((("dp", 2), ("cp", 2)), (("dp", 4), ("cp", 2)), False),  # rows 0 to 3 are what they were
        ((("dp", 4), ("cp", 2)), (("dp", 2), ("cp", 2)), False),
        ((("dp", 1), ("cp", 4)), (("dp", 2), ("cp", 4)), False),
        ((("cp", 4),), (("dp", 2), ("cp", 4)), False),
        ((("dp", 4), ("cp", 1)), (("dp", 4),), False),
        ((("pp", 2), ("dp", 2), ("cp", 3)), (("pp", 3), ("dp", 2), ("cp", 3)), False),
        ((("cp", 4),), (("dp", 2), ("cp", 2)), True),
        ((("dp", 2), ("cp", 2)), (("dp", 2), ("cp", 4)), True),
        ((("dp", 2), ("cp", 2)), (("cp", 4),), True),
    ],
)
@pytest.mark.parametrize("flattened", [False, True])
def test_a_mesh_is_said_if_a_row_has_another_coordinate_on_it(
    then: Mesh, now: Mesh, renumbered: bool, flattened: bool
) -> None:
    rows_then, rows_now = (math.prod(size for _, size in mesh) for mesh in (then, now))
    record, loading = of(rows_then, then, "a"), job(rows_now, now, "a")
    if flattened:
        record = replace(record, mesh=(("all", rows_then),), parts=then)
        loading = replace(loading, mesh=(("all", rows_now),), parts=now)
    texts = resume(record, loading).remarks
    assert any("another coordinate now" in text for text in texts) == renumbered


def test_a_flattened_mesh_of_a_record_that_does_not_know_its_parts_is_taken_by_its_name() -> None:
    parts = (("dp", 2), ("cp", 2))
    loading = replace(job(4, (("dp_cp", 4),), "a"), parts=parts)
    assert resume(of(4, (("dp_cp", 4),), "a"), loading).remarks == ()
    assert resume(of(4, parts, "a"), loading).remarks == ()
    assert len(resume(of(4, (("other", 4),), "a"), loading).remarks) == 1


def test_another_seed_is_said_where_it_has_no_effect() -> None:
    [text] = resume(of(1, None, "a"), replace(job(1, None, "a"), seed=2)).remarks
    assert text == "saved with seed=1, now seed=2: the saved streams continue"
    registered = {"a": Slot("python", False, False)}
    assert resume(of(1, None, "a"), Job(0, 1, None, True, registered, seed=2)).remarks == ()


def test_what_holds_for_this_rows_generators_is_told_apart() -> None:
    outcome = resume(of(3, None, "a", "b"), replace(job(2, None, "b", "c"), seed=2))
    assert len(outcome.of_generators) == 2
    assert set(outcome.of_generators) < set(outcome.remarks)
    assert len(outcome.remarks) == 4


def test_the_kind_of_every_generator_is_compared() -> None:
    record = of(1, None, "a", "b", "c")
    here = job(1, None, "a", "b", "c")
    for name in "abc":
        other = Job(0, 1, None, True, {**here.slots, name: Slot("torch.cpu", False, True)})
        with pytest.raises(RNGStateError, match=f"^{name}: .*a python generator.*is torch.cpu"):
            resume(record, other)


def test_a_record_of_this_job_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rng = StatefulRNG(1, generators={"own": random.Random(1)})
        state = {KEY: rng.state_dict()[KEY].clone()}
        draw()
        rng.load_state_dict(state)


# Generators that are forked, kept, absent or ignored.


def job_of(row: int, rows: int, *, ranked: bool, mesh: tuple[tuple[str, int], ...] | None) -> Job:
    slots = {
        "python": Slot("python", False, True),
        "noise": Slot("torch.cpu", False, False),
        "order": Slot("numpy.PCG64", True, False),
    }
    return Job(row, rows, mesh, ranked, slots)


def saved(rows: int, *, ranked: bool, mesh: tuple[tuple[str, int], ...] | None) -> Record:
    streams = {
        "python": Stream("python", False, b"p"),
        "noise": Stream("torch.cpu", False, b"n"),
        "order": Stream("numpy.PCG64", True, b"o"),
    }
    return Record(0, rows, rows, 1, ranked, 3, 1, mesh, streams)


@pytest.mark.parametrize("ranked_then", [False, True])
@pytest.mark.parametrize("ranked_now", [False, True])
def test_on_a_new_row_globals_follow_ranked_and_registered_ones_do_not(
    ranked_then: bool, ranked_now: bool
) -> None:
    record = saved(2, ranked=ranked_then, mesh=None)
    plan = resume(record, job_of(2, 4, ranked=ranked_now, mesh=None))
    forked = {"noise"} | ({"python"} if ranked_then or ranked_now else set())
    assert plan.seeds.keys() == forked
    assert plan.states == {"python": b"p", "noise": b"n", "order": b"o"}
    assert plan.resizes == 4
    assert plan.seeds["noise"] == fork_seed("noise", 2, 4, b"n")
    own = resume(record, job_of(0, 4, ranked=ranked_now, mesh=None))
    assert (own.states, own.seeds) == (plan.states, {})


@pytest.mark.parametrize(
    ("then", "now", "remark"),
    [
        (None, None, ""),
        ((("dp", 4),), (("dp", 4),), ""),
        ((("dp", 4), ("pp", 2)), (("dp", 2), ("pp", 4)), "along dp 4 x pp 2 and are loaded along"),
        ((("dp", 2), ("pp", 4)), (("pp", 4), ("dp", 2)), "loaded along pp 4 x dp 2: row r may bel"),
        (None, (("dp", 8),), "saved along all ranks and are loaded along dp 8"),
        ((("dp", 8),), None, "saved along dp 8 and are loaded along all ranks"),
    ],
)
def test_another_mesh_of_as_many_rows_warns(then: object, now: object, remark: str) -> None:
    rows = 4 if remark == "" else 8
    record = saved(rows, ranked=True, mesh=then)  # type: ignore[arg-type]
    plan = resume(record, job_of(0, rows, ranked=True, mesh=now))  # type: ignore[arg-type]
    assert remark in " ".join(plan.remarks)
    assert bool(plan.remarks) == bool(remark)


@pytest.mark.parametrize(
    ("then", "now", "rows", "is_global", "remark"),
    [
        (False, True, 2, True, "saved with ranked=False, now ranked=True"),
        (True, False, 2, True, "saved with ranked=True, now ranked=False"),
        (True, True, 2, True, ""),
        (False, True, 1, True, ""),  # one row: it makes no difference
        (False, True, 2, False, ""),  # nor where no global stream is stored
    ],
)
def test_another_ranked_warns(
    then: bool, now: bool, rows: int, is_global: bool, remark: str
) -> None:
    job = job_of(0, rows, ranked=now, mesh=None)
    python = job.slots["python"]._replace(is_global=is_global)
    job = dataclasses.replace(job, slots={**job.slots, "python": python})
    plan = resume(saved(rows, ranked=then, mesh=None), job)
    assert remark in " ".join(plan.remarks)
    assert bool(plan.remarks) == bool(remark)


@pytest.mark.parametrize(
    ("shared", "rows", "remark"),
    [
        (True, 2, "noise was saved in generators=, now in shared_generators=: ranks that differed"),
        (False, 2, "order was saved in shared_generators=, now in generators=: ranks that drew al"),
        (True, 1, ""),  # one row: it makes no difference
    ],
)
def test_a_generator_that_is_shared_now_or_no_longer_warns(
    shared: bool, rows: int, remark: str
) -> None:
    job = job_of(0, rows, ranked=True, mesh=None)
    name = "noise" if shared else "order"
    moved = {name: job.slots[name]._replace(shared=shared)}
    job = dataclasses.replace(job, slots={**job.slots, **moved})
    plan = resume(saved(rows, ranked=True, mesh=None), job)
    assert plan.states.keys() == {"python", "noise", "order"}
    assert not plan.seeds
    assert remark in " ".join(plan.remarks)
    assert len(plan.remarks) == bool(remark)


def test_one_dimension_that_grows_keeps_its_numbers_and_two_do_not() -> None:
    grown = resume(
        saved(2, ranked=True, mesh=(("dp", 2),)),
        job_of(0, 3, ranked=True, mesh=(("dp", 3),)),
    )
    assert len(grown.remarks) == 1
    assert "2 rows were saved and 3 are loaded: row 2 is new, row 2 from row 0" in grown.remarks[0]
    assert "(python, noise forked; order taken as saved)" in grown.remarks[0]
    two = resume(
        saved(4, ranked=True, mesh=(("pp", 2), ("dp", 2))),
        job_of(0, 8, ranked=True, mesh=(("pp", 2), ("dp", 4))),
    )
    assert "row r may belong to another coordinate now" in two.remarks[1]


def test_record_of_a_live_rng_is_what_resume_takes() -> None:
    rng = StatefulRNG(1)
    record = record_of(rng.state_dict())
    slots = {name: Slot(stream.kind, False, True) for name, stream in record.streams.items()}
    plan = resume(record, Job(0, 1, None, False, slots))
    assert plan.states.keys() == slots.keys()
    assert plan.remarks == ()


def test_fork_seeds_are_64_bits_that_depend_on_all_they_are_made_from() -> None:
    seeds = {
        fork_seed(name, row, resizes, state)
        for name in ("python", "numpy")
        for row in (4, 5)
        for resizes in (1, 2)
        for state in (b"state", b"stata")
    }
    assert len(seeds) == 16
    many = [fork_seed("torch", row, 1, b"state") for row in range(200)]
    assert min(many) >= 0
    assert 2**63 < max(many) < 2**64, "the upper bits are used"
    # For ever: a job that grows from a checkpoint of today draws the same numbers tomorrow.
    assert fork_seed("python", 4, 1, b"state") == 3821221214801519556
