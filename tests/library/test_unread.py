"""A load that read nothing is told from a state that somebody gives back."""

import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlanner

from nemo_rng_dcp import RNGLoadPlanner, RNGStateWarning, StatefulRNG
from nemo_rng_dcp.record import KEY
from nemo_rng_dcp.unread import is_found_again, mark
from tests.support.records import record_of
from tests.support.streams import draw, unmoved, warned

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

State = dict[str, Any]


class App:
    """An entry with a StatefulRNG inside; it may draw, and change what it is given, in a load."""

    def __init__(self, change: Callable[[State], State] = lambda state: state) -> None:
        self.rng, self.change = StatefulRNG(1), change

    def state_dict(self) -> State:
        return {"w": torch.ones(1), "rng": self.rng.state_dict()}

    def load_state_dict(self, state: State) -> None:
        draw()
        self.rng.load_state_dict(self.change(state["rng"]))


class NewEachTime(App):
    def load_state_dict(self, state: State) -> None:
        self.rng = StatefulRNG(1)
        super().load_state_dict(state)


def partial() -> LoadPlanner:
    return DefaultLoadPlanner(allow_partial_load=True)


def cloned(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def without_rng(tmp_path: Path) -> Path:
    dcp.save({"app": {"w": torch.ones(1)}}, checkpoint_id=tmp_path / "without")
    return tmp_path / "without"


@pytest.mark.parametrize("app", [App(), App(cloned), App(deepcopy), NewEachTime()])
@pytest.mark.parametrize("planner", [partial, RNGLoadPlanner, lambda: RNGLoadPlanner(partial())])
def test_nothing_was_read_whatever_was_drawn_and_copied(
    app: App, planner: Callable[[], LoadPlanner], without_rng: Path
) -> None:
    for _ in range(2):  # a second load says it again
        app.rng.load_state_dict(app.rng.state_dict())
        [text] = warned(
            lambda: dcp.load({"app": app}, checkpoint_id=without_rng, planner=planner())
        )
        assert "rank 0: the load restored no random stream" in text
        assert "the checkpoint holds no RNG state" in text
        assert app.rng.loaded is None
        with unmoved(), pytest.raises(RuntimeError, match="nothing was loaded"):
            app.rng.rewind()


def test_one_object_under_two_keys_is_told_twice(without_rng: Path) -> None:
    rng = StatefulRNG(1)
    state = {"a": rng, "app": {"w": torch.zeros(1)}, "b": rng}
    with unmoved():
        texts = warned(lambda: dcp.load(state, checkpoint_id=without_rng, planner=partial()))
    assert len(texts) == 2
    assert rng.loaded is None


def test_the_warning_names_the_callers_line_and_can_be_an_error(without_rng: Path) -> None:
    rng = StatefulRNG(1)
    rng.load_state_dict(rng.state_dict())
    with pytest.warns(RNGStateWarning) as caught:
        dcp.load({"rng": rng}, checkpoint_id=without_rng, planner=RNGLoadPlanner())
    [warning] = [each for each in caught if each.category is RNGStateWarning]
    assert warning.filename == __file__
    rng.load_state_dict(rng.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RNGStateWarning)
        with unmoved(), pytest.raises(RNGStateWarning, match="no random stream"):
            dcp.load({"rng": rng}, checkpoint_id=without_rng, planner=RNGLoadPlanner())
    assert rng.loaded is None


def test_what_state_dict_gave_outside_of_a_load_is_a_state(tmp_path: Path) -> None:
    """With warnings as errors, as in a job that has to be exact."""
    rng = StatefulRNG(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RNGStateWarning)
        dcp.save({"rng": rng}, checkpoint_id=tmp_path)
        dcp.load({"rng": rng}, checkpoint_id=tmp_path)
        with unmoved():
            rng.load_state_dict(rng.state_dict())  # no stream moved in between
        assert rng.loaded is not None
        expected = draw()
        rng.rewind()
        assert draw() == expected
        kept = {"rng": rng.state_dict()}
        expected = draw()
        dcp.save(kept, checkpoint_id=tmp_path)
        dcp.load(kept, checkpoint_id=tmp_path)
        rng.load_state_dict(kept["rng"])
        assert draw() == expected


class SavesWhileItLoads:
    """An entry that hands streams on in the middle of a load."""

    def __init__(self, path: Path) -> None:
        self.rng, self.path, self.state = StatefulRNG(1), path, {}  # type: ignore[var-annotated]

    def state_dict(self) -> State:
        dcp.save({"rng": self.rng}, checkpoint_id=self.path)
        return {"w": torch.zeros(1)}

    def load_state_dict(self, state: State) -> None:
        self.state = self.rng.state_dict()


def test_streams_that_are_asked_for_inside_a_load_are_a_state(
    without_rng: Path, tmp_path: Path
) -> None:
    app = SavesWhileItLoads(tmp_path / "saved")
    dcp.load({"app": app}, checkpoint_id=without_rng)
    assert not record_of(app.state).unread
    assert warned(lambda: app.rng.load_state_dict(app.state)) == []
    assert warned(lambda: dcp.load({"rng": app.rng}, checkpoint_id=tmp_path / "saved")) == []


@pytest.mark.parametrize("planner", [DefaultLoadPlanner, RNGLoadPlanner])
def test_a_record_with_a_mark_that_was_saved_is_loaded(
    planner: Callable[[], LoadPlanner], without_rng: Path, tmp_path: Path
) -> None:
    """What a load put into a kept dict, saved again, is no checkpoint without streams."""
    rng = StatefulRNG(1)
    kept = {"rng": rng.state_dict(), "app": {"w": torch.zeros(1)}}
    expected = draw()
    dcp.load(kept, checkpoint_id=without_rng, planner=RNGLoadPlanner())
    assert len(warned(lambda: rng.load_state_dict(kept["rng"]))) == 1
    dcp.save(kept, checkpoint_id=tmp_path / "again")

    def again(state: State) -> None:
        dcp.load(state, checkpoint_id=tmp_path / "again", planner=planner())

    assert warned(lambda: again({"rng": rng})) == []
    assert draw() == expected
    again(kept)
    assert warned(lambda: rng.load_state_dict(kept["rng"])) == []
    assert draw() == expected


def test_marks_of_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of several rows may be, where the clock is coarse."""
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    moments = [mark() for _ in range(3)]
    assert moments == [10**18, 10**18 + 1, 10**18 + 2]
    assert [is_found_again(moment) for moment in moments + moments] == [True] * 3 + [False] * 3


def test_the_mark_of_another_process_is_of_no_account() -> None:
    rng = StatefulRNG(1)
    record = record_of(rng.state_dict())
    state = {KEY: replace(record, unread=True, taken_at=10**18).to_tensor()}
    assert warned(lambda: rng.load_state_dict(state)) == []
    assert rng.loaded is not None
    assert rng.loaded.saved_at is not None
    assert rng.loaded.saved_at.year == 2001
