"""What a record's head says when the saved job and the resuming one differ."""

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
from nemo_rng_dcp.resume import Job, resume
from nemo_rng_dcp.versions import version_number, version_text
from tests.support.altered import State, altered, record_of
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
    [text] = [str(each.message) for each in caught]
    assert f"saved with {name} {version_text(then)}, now {here}: the streams continue" in text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2.13.0+cpu", 2_013_000),
        ("3.11.7", 3_011_007),
        ("2.4", 2_004_000),
        ("2.15.0a0+git1234", 2_015_000),
        ("unknown", 0),
    ],
)
def test_versions_are_numbers(text: str, number: int) -> None:
    assert version_number(text) == number
    if number:
        assert version_text(number).startswith(text[:3])


# What is said of rows, generators and meshes.


def of(rows: int, mesh: Mesh | None, *names: str) -> Record:
    streams = {name: Stream("python", False, name.encode()) for name in names}
    return Record(0, rows, rows, 1, True, 0, 1, mesh, streams)


def job(rows: int, mesh: Mesh | None, *names: str) -> Job:
    slots = {name: Slot("python", False, True) for name in names}
    return Job(0, rows, mesh, True, slots)


@pytest.mark.parametrize(
    ("then", "now", "said"),
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
def test_rows_are_counted_in_words(then: int, now: int, said: str) -> None:
    its = resume(of(then, None, "a", "b"), job(now, None, "a", "b"))
    assert its.resizes == 1
    [text] = its.remarks
    assert text.startswith(said)


def test_all_that_only_one_side_has_is_named() -> None:
    its = resume(of(1, None, "a", "b", "c"), job(1, None, "c", "d", "e"))
    assert (its.states, its.resizes) == ({"c": b"c"}, 0)
    absent, ignored = its.remarks
    assert "the checkpoint has no d, e: the stream stays as it is" in absent
    assert "the checkpoint has a, b, which this job does not have: ignored" in ignored


@pytest.mark.parametrize("then", [(("a", 2), ("b", 3)), (("a", 3), ("b", 2)), (("c", 6),), None])
@pytest.mark.parametrize("now", [(("b", 3), ("a", 2)), (("b", 2), ("a", 3)), (("a", 6),)])
def test_a_permuted_or_renamed_mesh_is_said(then: Mesh | None, now: Mesh | None) -> None:
    its = resume(of(6, then, "a"), job(6, now, "a"))
    assert any("row r may belong to another coordinate now" in text for text in its.remarks)


@pytest.mark.parametrize(
    ("then", "now", "renumbered"),
    [
        ((("dp", 2), ("cp", 2)), (("dp", 4), ("cp", 2)), False),  # rows 0 to 3 are what they were
        ((("dp", 4), ("cp", 2)), (("dp", 2), ("cp", 2)), False),
        ((("dp", 1), ("cp", 4)), (("dp", 2), ("cp", 4)), False),
        ((("cp", 4),), (("dp", 2), ("cp", 4)), False),
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


def test_nothing_is_said_of_a_record_of_this_job() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rng = StatefulRNG(1, generators={"own": random.Random(1)})
        state = {KEY: rng.state_dict()[KEY].clone()}
        draw()
        rng.load_state_dict(state)
