"""RNGLoadPlanner: any number of rows, any set of generators, around any planner."""

import dataclasses
import importlib
import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, _version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import (
    BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import nemo_rng_dcp.planner
from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from nemo_rng_dcp.record import KEY
from nemo_rng_dcp.table import Wanted, reads_of_rows
from tests.support.jobs import job
from tests.support.records import change_metadata, record_of, without
from tests.support.streams import draw, unmoved, warned

Numbers = list[float]
FakeGroup = Callable[[int, int], None]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# Every rank gets its row or a stream of its own.


def save(path: Path, ranked: bool) -> Numbers:
    rng = StatefulRNG(42, ranked=ranked)
    draw(dist.get_rank() % 3 if ranked else 1)
    dcp.save({"rng": rng}, checkpoint_id=path)
    return draw()


def load_twice(path: Path, ranked: bool) -> tuple[Numbers, Numbers]:
    found = []
    for _ in range(2):
        rng = StatefulRNG(1000, ranked=ranked)
        dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
        found.append(draw())
    return found[0], found[1]


@settings(max_examples=10, deadline=None)
@given(saved=st.integers(1, 4), loaded=st.integers(1, 6), ranked=st.booleans())
def test_every_rank_gets_its_row_or_a_stream_of_its_own(
    saved: int, loaded: int, ranked: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = job(saved, save, Path(folder), ranked)
        found = job(loaded, load_twice, Path(folder), ranked)
    assert all(first == second for first, second in found), "the same resume, the same streams"
    streams = [first for first, _ in found]
    assert streams[:saved] == expected[:loaded]
    if ranked:
        numbers = [number for stream in [*expected, *streams[saved:]] for number in stream]
        assert len(set(numbers)) == len(numbers)
    else:
        assert streams == [expected[0]] * loaded


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3), (3, 5)])
def test_all_rows_in_one_chunk_are_read_by_the_same_rules(
    rank: int, world_size: int, tmp_path: Path, fake_group: FakeGroup
) -> None:
    """As torch_save_to_dcp writes a table."""
    records, expected = [], []
    for row in range(3):
        fake_group(row, 3)
        rng = StatefulRNG(42, ranked=True)
        table = rng.state_dict()[KEY]
        assert isinstance(table, DTensor)
        records.append(table.to_local())
        expected.append(draw())
    dcp.save({"rng": {KEY: torch.cat(records)}}, checkpoint_id=tmp_path, no_dist=True)
    fake_group(rank, world_size)
    rng = StatefulRNG(1000, ranked=True)
    dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner(), no_dist=True)
    assert (draw() == expected[rank % 3]) == (rank < 3)
    planner = RNGLoadPlanner()
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    planner.set_up_planner({"rng": rng.state_dict()}, metadata)
    [read] = planner.create_local_plan().items
    length = len(records[0])
    found = read.storage_offsets, read.lengths
    assert found == ((rank % 3 * length,), (length,)), "no other row is read"


# What only one side has, and another length of the record.


def save_with(path: Path, *names: str) -> Numbers:
    generators = {name: np.random.default_rng([ord(name), dist.get_rank()]) for name in names}
    rng = StatefulRNG(42, ranked=True, generators=generators)
    dcp.save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path)
    return [*draw(), *(generator.random() for generator in generators.values())]


def load_with(path: Path, *names: str) -> tuple[Numbers, list[str]]:
    generators = {name: np.random.default_rng(5) for name in names}
    rng = StatefulRNG(1000, ranked=True, generators=generators)
    state = {"rng": rng, "weight": torch.zeros(3)}
    messages = warned(lambda: dcp.load(state, checkpoint_id=path, planner=RNGLoadPlanner()))
    assert torch.equal(state["weight"], torch.ones(3))  # type: ignore[arg-type]
    return [*draw(), *(generator.random() for generator in generators.values())], messages


@pytest.mark.parametrize("size", [1, 2, 3])
def test_another_set_of_generators_restores_what_both_have(size: int, tmp_path: Path) -> None:
    saved = job(2, save_with, tmp_path, "a", "b")
    untouched = float(np.random.default_rng(5).random())
    for rank, (found, messages) in enumerate(job(size, load_with, tmp_path, "b", "c")):
        if rank < 2:
            assert found[:-1] == [*saved[rank][:-2], saved[rank][-1]]
        assert found[-1] == untouched
        [text] = messages if rank == 0 else [""]
        assert ("the checkpoint has no c" in text) == (rank == 0)
        assert ("has a, which this job does not have" in text) == (rank == 0)


# Loads that restore nothing, or not for every rank.


def save_weight(path: Path) -> None:
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=path)


def load_nothing(path: Path, planner: Any) -> tuple[list[str], bool]:
    rng = StatefulRNG(1000, ranked=True)
    state = {"weight": torch.zeros(3), "rng": rng}
    with unmoved():
        messages = warned(lambda: dcp.load(state, checkpoint_id=path, planner=planner))
    assert torch.equal(state["weight"], torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        rng.rewind()
    return messages, True


@pytest.mark.parametrize(
    "planner",
    [
        RNGLoadPlanner(),
        DefaultLoadPlanner(allow_partial_load=True),
        RNGLoadPlanner(DefaultLoadPlanner(allow_partial_load=True)),
    ],
)
def test_a_load_that_restores_nothing_warns_on_every_rank(planner: Any, tmp_path: Path) -> None:
    job(2, save_weight, tmp_path)
    for rank, (messages, _) in enumerate(job(2, load_nothing, tmp_path, planner)):
        [text] = messages
        assert f"rank {rank}: the load restored no random stream" in text


class Drawing:
    """An entry that draws while it is loaded."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(3)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        draw()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_draw_during_the_load_does_not_hide_that_nothing_was_restored(tmp_path: Path) -> None:
    dcp.save({"app": Drawing()}, checkpoint_id=tmp_path)
    rng = StatefulRNG(1)
    state = {"app": Drawing(), "rng": rng}
    [text] = warned(lambda: dcp.load(state, checkpoint_id=tmp_path, planner=RNGLoadPlanner()))
    assert "rank 0: the load restored no random stream" in text
    assert rng.loaded is None


def save_alone(path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    if dist.get_rank() == 0:
        dcp.save({"rng": rng}, checkpoint_id=path, no_dist=True)
    dist.barrier()


def load_what_rank_0_saved(path: Path) -> tuple[list[str], str]:
    rng = StatefulRNG(42, ranked=True)
    draw()
    messages = warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path))
    with unmoved(), pytest.raises(CheckpointException) as caught:
        dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
    return messages, str(caught.value)


def test_a_row_that_was_not_saved_is_not_missed_in_silence(tmp_path: Path) -> None:
    """DCP writes what it is given; without coordination nobody checks that it is all rows."""
    job(2, save_alone, tmp_path)
    (first, text), (second, _) = job(2, load_what_rank_0_saved, tmp_path)
    assert first == []
    [said_by_rank_1] = second
    assert "rank 1: the load restored no random stream" in said_by_rank_1
    assert "the checkpoint holds no RNG state (rng_streams) for row 1" in said_by_rank_1
    assert "the checkpoint's metadata has no chunk of" in text, "with the planner it is an error"


# Weights are loaded as strictly as without it, whatever they are called.


class Inner(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((8, 2), value))
        self.register_buffer("counts", torch.full((3,), int(value)))


class Model(torch.nn.Module):
    """Its weights have the names of RNG entries, and stand beside one."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.rng = Inner(value)
        self.rng_streams = torch.nn.Parameter(torch.full((8,), value))
        self.app = torch.nn.Module()
        self.app.register_buffer("rng_streams", torch.full((3,), int(value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def sharded(value: float) -> Model:
    model = Model(value)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


def whole_weights(state: dict[str, Any]) -> list[bool]:
    values = [value for value in state.values() if not isinstance(value, StatefulRNG)]
    full = [v.full_tensor() if isinstance(v, DTensor) else v for v in values]
    return [bool((v == 7).all()) for v in full]


def save_beside_weights(path: Path) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    dcp.save({"rng": rng, **sharded(7.0).state_dict()}, checkpoint_id=path)
    return draw()


def load_beside_weights(path: Path) -> tuple[Numbers, list[bool], str]:
    rng = StatefulRNG(1000, ranked=True)
    state = {"rng": rng, **sharded(0.0).state_dict()}
    dcp.load(state, checkpoint_id=path, planner=RNGLoadPlanner())
    found = draw(), whole_weights(state)
    more = {**state, "rng.bias": torch.zeros(3)}
    with unmoved(), pytest.raises(CheckpointException) as caught:
        dcp.load(more, checkpoint_id=path, planner=RNGLoadPlanner())
    return *found, str(caught.value)


@pytest.mark.parametrize("size", [2, 3])
def test_weights_called_rng_are_loaded_whole_and_strictly(size: int, tmp_path: Path) -> None:
    saved = job(2, save_beside_weights, tmp_path)
    for rank, (numbers, whole, text) in enumerate(job(size, load_beside_weights, tmp_path)):
        assert whole == [True] * 4
        assert "Missing key in checkpoint state_dict: rng.bias" in text
        if rank < 2:
            assert numbers == saved[rank]


class Together:
    """A Stateful that returns weights and the RNG entry in one dict, at one level."""

    def __init__(self, value: float, seed: int) -> None:
        self.rng = StatefulRNG(seed, ranked=True)
        self.state = {"weight": torch.full((3, 2), value), "step": int(value), "name": str(value)}

    def state_dict(self) -> dict[str, Any]:
        return {**self.state, **self.rng.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rng.load_state_dict(state_dict)
        self.state = {key: state_dict[key] for key in self.state}


def save_together(path: Path) -> Numbers:
    dcp.save({"rng": Together(7, 42)}, checkpoint_id=path)
    return draw()


def load_together(path: Path) -> tuple[Numbers, list[float], int, str]:
    here = Together(0, 1000)
    dcp.load({"rng": here}, checkpoint_id=path, planner=RNGLoadPlanner())
    state = here.state
    return draw(), state["weight"].flatten().tolist(), state["step"], state["name"]  # type: ignore[attr-defined,return-value]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_weights_and_bytes_beside_the_record_are_loaded(size: int, tmp_path: Path) -> None:
    saved = job(2, save_together, tmp_path)
    for rank, (numbers, weight, step, name) in enumerate(job(size, load_together, tmp_path)):
        assert (weight, step, name) == ([7.0] * 6, 7, "7")
        if rank < 2:
            assert numbers == saved[rank]


# Entries: at the top level, nested, several, elsewhere.


def save_entries(path: Path) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    noise = random.Random(dist.get_rank())
    other = StatefulRNG(42, generators={"noise": noise}, global_generators=False)
    nested = {"list": [{"other": other.state_dict()}], "weight": torch.ones(2)}
    dcp.save({**rng.state_dict(), "app": nested}, checkpoint_id=path)
    return [*draw(), noise.random()]


def load_entries(path: Path) -> Numbers:
    rng = StatefulRNG(1000, ranked=True)
    noise = random.Random(99)
    other = StatefulRNG(42, generators={"noise": noise}, global_generators=False)
    state: dict[str, Any] = {
        **rng.state_dict(),
        "app": {"list": [{"other": other.state_dict()}], "weight": torch.zeros(2)},
    }
    dcp.load(state, checkpoint_id=path, planner=RNGLoadPlanner())
    rng.load_state_dict(state)
    other.load_state_dict(state["app"]["list"][0]["other"])
    assert state["app"]["weight"].tolist() == [1, 1]
    return [*draw(), noise.random()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_entries_are_found_at_the_top_level_and_nested(size: int, tmp_path: Path) -> None:
    saved = job(2, save_entries, tmp_path)
    loaded = job(size, load_entries, tmp_path)
    assert loaded[:2] == saved[:size]
    assert len({number for numbers in loaded for number in numbers}) == 7 * size


def load_elsewhere(path: Path) -> list[str]:
    rng = StatefulRNG(1000, ranked=True)
    state = {"app": {"rng": rng.state_dict(), "rng_streams": torch.zeros(3)}}
    planner = RNGLoadPlanner(DefaultLoadPlanner(allow_partial_load=True))
    return warned(lambda: dcp.load(state, checkpoint_id=path, planner=planner))


def test_a_record_for_which_the_job_has_no_entry_is_named_once(tmp_path: Path) -> None:
    job(2, save, tmp_path, True)
    messages = job(2, load_elsewhere, tmp_path)
    assert [len(warned_of) for warned_of in messages] == [1, 0]
    assert "RNG state at rng.rng_streams, for which this job has no StatefulRNG" in messages[0][0]


# Around a planner of the user's own.


class Renaming(DefaultLoadPlanner):
    """Asks the checkpoint for weights under the names that they had in an earlier version."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        saved = metadata.state_dict_metadata
        self.seen = {*saved, *state_dict, *(k for v in state_dict.values() for k in _keys(v))}
        renamed = {key.replace("old.", "new."): entry for key, entry in saved.items()}
        metadata = dataclasses.replace(metadata, state_dict_metadata=renamed)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[_with_old_name(item) for item in plan.items])


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _with_old_name(item: ReadItem) -> ReadItem:
    index = item.storage_index
    old = dataclasses.replace(index, fqn=index.fqn.replace("new.", "old."))
    return dataclasses.replace(item, storage_index=old)


def save_old_names(path: Path) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    dcp.save({"rng": rng, "old": {"weight": torch.ones(3)}}, checkpoint_id=path)
    return draw()


def load_new_names(path: Path) -> tuple[Numbers, bool]:
    rng = StatefulRNG(1000, ranked=True)
    state = {"rng": rng, "new": {"weight": torch.zeros(3)}}
    planner = Renaming()
    dcp.load(state, checkpoint_id=path, planner=RNGLoadPlanner(planner))
    assert torch.equal(state["new"]["weight"], torch.ones(3))  # type: ignore[index]
    return draw(), any(KEY in key for key in planner.seen)


@pytest.mark.parametrize("size", [2, 3])
def test_around_a_planner_that_renames_keys(size: int, tmp_path: Path) -> None:
    saved = job(2, save_old_names, tmp_path)
    loaded = job(size, load_new_names, tmp_path)
    assert [numbers for numbers, _ in loaded[:2]] == saved
    assert not any(seen for _, seen in loaded), "the other planner sees no record"


def test_a_row_is_read_as_the_default_planner_reads_it(tmp_path: Path) -> None:
    job(3, save_together, tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    saved = metadata.state_dict_metadata["rng.rng_streams"]
    assert isinstance(saved, TensorStorageMetadata)
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"rng.rng_streams": torch.zeros(saved.size)}, metadata)
    for row, expected in enumerate(planner.create_local_plan().items):
        wanted = Wanted(range(row, row + 1), saved.size[0] // 3)
        [read] = reads_of_rows("rng.rng_streams", wanted, saved)
        # It reads into a tensor of its own, and not into the row of a table.
        zero = MetadataIndex("rng.rng_streams", torch.Size((0,)))
        assert read == dataclasses.replace(expected, dest_index=zero, dest_offsets=torch.Size((0,)))
        assert read.storage_index.index == expected.storage_index.index == row


class Noting(DefaultLoadPlanner):
    """Notes what is in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, list[float]]] = []

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.noted.append((read_item.dest_index.fqn, tensor.tolist()))


def test_the_other_planner_is_told_of_all_that_was_read_but_records(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    dcp.save({"rng": rng, "weight": torch.ones(2)}, checkpoint_id=tmp_path)
    planner = Noting()
    state = {"rng": rng, "weight": torch.zeros(2)}
    dcp.load(state, checkpoint_id=tmp_path, planner=RNGLoadPlanner(planner))
    assert planner.noted == [("weight", [1, 1])]
    assert planner.is_coordinator


class MakesPlansAnew(dcp.FileSystemReader):
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return LoadPlan(plan.items, planner_data="the reader's")


class SeesData(DefaultLoadPlanner):
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        self.seen = [plan.planner_data for plan in global_plan]
        return super().create_global_plan(global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        self.seen.append(central_plan.planner_data)
        return super().finish_plan(central_plan)


def test_plans_that_a_reader_made_anew_are_taken_as_they_are(tmp_path: Path) -> None:
    rng, planner = StatefulRNG(1), SeesData()
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = draw()
    reader = MakesPlansAnew(tmp_path)
    dcp.load({"rng": rng}, storage_reader=reader, planner=RNGLoadPlanner(planner))
    assert draw() == expected
    assert planner.seen == ["the reader's"] * 2


class Refusing(DefaultLoadPlanner):
    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def set_up_planner(self, *arguments: Any, **options: Any) -> None:
        super().set_up_planner(*arguments, **options)
        if self.step == "set_up":
            raise ValueError("not today")

    def create_local_plan(self) -> LoadPlan:
        raise ValueError("not today")


@pytest.mark.parametrize("step", ["set_up", "plan"])
def test_the_table_is_back_in_its_place_whatever_happens(step: str, tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    dcp.save({"app": rng.state_dict()}, checkpoint_id=tmp_path)
    state = rng.state_dict()  # dcp.load copies the outermost dict, and no other
    given = state[KEY]
    planner = RNGLoadPlanner(Refusing(step))
    with unmoved(), pytest.raises(CheckpointException, match="not today"):
        dcp.load({"app": state}, checkpoint_id=tmp_path, planner=planner)
    assert state[KEY] is given


def test_one_planner_serves_several_loads(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    planner = RNGLoadPlanner()
    for name in ("a", "b"):
        draw()
        dcp.save({name: rng}, checkpoint_id=tmp_path / name)
        expected = draw()
        dcp.load({name: rng}, checkpoint_id=tmp_path / name, planner=planner)
        assert draw() == expected


@pytest.mark.parametrize("planner", ["default", 0, DefaultLoadPlanner, ("rng",)])
def test_what_is_no_planner_is_refused(planner: Any) -> None:
    with pytest.raises(TypeError, match="expected a LoadPlanner or None"):
        RNGLoadPlanner(planner)


@pytest.mark.parametrize("planner", [RNGLoadPlanner(), DefaultLoadPlanner()])
def test_a_checkpoint_of_torch_2_3_loads_as_with_the_default_planner(
    planner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.3 stored a dict without tensors as one value; later ones store its values."""
    rng = StatefulRNG(1)
    with monkeypatch.context() as patch:
        patch.setattr(_version, "_derived_version", "2_3")
        dcp.save({"rng": rng, "options": {"rate": 1.5}}, checkpoint_id=tmp_path)
    stored = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert "options" in stored
    expected = draw()
    state = {"rng": rng, "options": {"rate": 0.0}}
    dcp.load(state, checkpoint_id=tmp_path, planner=planner)
    assert state["options"] == {"rate": 1.5}
    assert draw() == expected


# As torch's own readers and later versions use a planner.


@pytest.mark.filterwarnings("ignore")
def test_torchs_reader_of_a_torch_file_finds_what_it_asks_of_a_planner(tmp_path: Path) -> None:
    begin_group_of_one(tmp_path)
    try:
        rng = StatefulRNG(1)
        saved = rng.state_dict()[KEY]
        assert isinstance(saved, DTensor)
        torch.save({KEY: saved.to_local(), "weight": torch.ones(3)}, tmp_path / "whole.pt")
        expected = draw()
        state = {**rng.state_dict(), "weight": torch.zeros(3)}
        dcp.load(
            state,
            checkpoint_id=tmp_path / "whole.pt",
            storage_reader=BroadcastingTorchSaveReader(),
            planner=RNGLoadPlanner(DynamicMetaLoadPlanner()),
        )
        rng.load_state_dict({KEY: state[KEY]})
        assert draw() == expected
        assert state["weight"].tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()


def begin_group_of_one(path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=0, world_size=1)


def test_the_other_planners_attributes_are_answered() -> None:
    inner = DefaultLoadPlanner(allow_partial_load=True)
    planner = RNGLoadPlanner(RNGLoadPlanner(inner))
    inner.note = "of a later torch"  # type: ignore[attr-defined]
    for name in (*vars(inner), "lookup_tensor", "transform_tensor"):
        assert getattr(planner, name) == getattr(inner, name)
    inner._private = 1  # type: ignore[attr-defined]
    for name, owner in {"no_such_name": "Default", "_private": "RNG"}.items():
        message = f"'{owner}LoadPlanner' object has no attribute '{name}'"
        with pytest.raises(AttributeError, match=message):
            getattr(planner, name)


class Forgetful(RNGLoadPlanner):
    def __init__(self) -> None:
        pass


def test_a_planner_that_was_not_set_up_says_what_it_has_not() -> None:
    with pytest.raises(AttributeError, match="'Forgetful' object has no attribute 'planner'"):
        Forgetful().set_up_planner({}, Metadata({}))


class Recording(LoadPlanner):
    """Knows nothing but which of its methods were called, and with what."""

    def __init__(self) -> None:
        self.called: dict[str, tuple[Any, ...]] = {}

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name == "called":
            return super().__getattribute__(name)

        def method(*arguments: Any) -> Any:
            self.called[name] = arguments
            if name == "create_local_plan":
                return LoadPlan([])
            return arguments[-1] if arguments else None

        return method


def hooks_that_are_passed_on(hook: str | None) -> list[str]:
    """Return the public methods of LoadPlanner that did not reach the wrapped planner."""
    if hook is not None:  # a later torch has it; this process ends with the test
        setattr(LoadPlanner, hook, lambda self, *arguments: None)
        importlib.reload(nemo_rng_dcp.planner)
    inner = Recording()
    planner = nemo_rng_dcp.planner.RNGLoadPlanner(inner)
    read = ReadItem(
        LoadItemType.TENSOR,
        *[MetadataIndex("w"), torch.Size([0])] * 2,  # type: ignore[arg-type]
        torch.Size([1]),
    )
    arguments: dict[str, tuple[Any, ...]] = {
        "set_up_planner": ({}, Metadata({})),
        "create_local_plan": (),
        "create_global_plan": ([LoadPlan([])],),
        "finish_plan": (LoadPlan([]),),
        "load_bytes": (read, io.BytesIO()),
        "commit_tensor": (read, torch.zeros(1)),
    }
    names = [name for name in dir(LoadPlanner) if not name.startswith("_")]
    for name in sorted(names, key="set_up_planner".__ne__):
        getattr(planner, name)(*arguments.get(name, (read,)))
    assert hook is None or hook in names
    assert inner.called["resolve_bytes"] == (read,)
    assert inner.called["set_up_planner"][2] is False, "by default no rank is the coordinator"
    return sorted(set(names) - set(inner.called))


@pytest.mark.parametrize("hook", [None, "of_a_later_torch"])
def test_every_public_method_reaches_the_other_planner(hook: str | None) -> None:
    assert job(1, hooks_that_are_passed_on, hook, group=False) == [[]]


def test_buffers_are_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = draw()
    with torch.device("meta"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner())
    assert draw() == expected


# Where an entry may lie: as the default planner finds it.


def random_state(rng: StatefulRNG, choose: random.Random, depth: int = 4) -> Any:
    """Return a random nested state with records somewhere in it."""
    kind = choose.random()
    if depth == 0 or kind < 0.35:
        leaves = [torch.full((choose.randint(1, 3),), 7.0), choose.randint(0, 9), "x", None]
        return choose.choice(leaves)
    if kind < 0.45:
        return {KEY: rng.state_dict()[KEY]}
    inner = [random_state(rng, choose, depth - 1) for _ in range(choose.randint(0, 3))]
    if kind < 0.85:
        return {choose.choice(["a", "b", "c", "d.e", 3, "rng", KEY]): value for value in inner}
    return inner


def emptied(state: Any, rng: StatefulRNG) -> Any:
    if isinstance(state, torch.Tensor):
        is_record = state.dtype == torch.int64
        return rng.state_dict()[KEY] if is_record else torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: emptied(value, rng) for key, value in state.items()}
    if isinstance(state, list):
        return [emptied(value, rng) for value in state]
    return None if state is None else "?"


def comparable(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items()}
    return [comparable(value) for value in state] if isinstance(state, list) else state


def loaded_with(planner: RNGLoadPlanner | None, state: Any, rng: StatefulRNG, path: Path) -> Any:
    draw()
    found = emptied(state, rng)
    try:
        dcp.load(found, checkpoint_id=path, no_dist=True, planner=planner)
    except CheckpointException as error:
        return str(error).strip().splitlines()[-1]
    return comparable(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(40))
def test_a_nested_state_is_loaded_as_by_the_default_planner(seed: int, tmp_path: Path) -> None:
    rng, choose = StatefulRNG(1), random.Random(seed)
    state = {f"k{number}": random_state(rng, choose) for number in range(choose.randint(1, 3))}
    state["rng"] = rng.state_dict()
    try:
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    except CheckpointException:
        pytest.skip("torch saves no state with two equal keys")
    expected = loaded_with(None, state, rng, tmp_path)
    assert loaded_with(RNGLoadPlanner(), state, rng, tmp_path) == expected


def test_elements_of_a_list_behind_an_entry_are_loaded(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    dcp.save({"list": [rng.state_dict(), torch.ones(2), 5]}, checkpoint_id=tmp_path)
    expected = draw()
    state: dict[str, list[Any]] = {"list": [rng.state_dict(), torch.zeros(2), 0]}
    dcp.load(state, checkpoint_id=tmp_path, planner=RNGLoadPlanner())
    rng.load_state_dict(state["list"][0])
    assert draw() == expected
    assert state["list"][1].tolist() == [1, 1]
    assert state["list"][2] == 5


def test_an_entry_below_a_list_that_was_not_saved_stops_nothing(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    dcp.save({"list": [{"weight": torch.ones(2)}]}, checkpoint_id=tmp_path)
    state = {"list": [{"weight": torch.zeros(2), **rng.state_dict()}]}
    dcp.load(state, checkpoint_id=tmp_path, planner=RNGLoadPlanner())
    assert state["list"][0]["weight"].tolist() == [1, 1]
    with unmoved():
        assert len(warned(lambda: rng.load_state_dict(state["list"][0]))) == 1


def test_a_long_list_is_searched_in_no_time_and_a_ring_ends() -> None:
    order = list(range(1_000_000))
    ring: dict[str, Any] = {}
    ring["a"] = [ring]
    start = time.process_time()
    planner = RNGLoadPlanner(Recording())
    planner.set_up_planner({"order": order, "ring": ring}, Metadata({"w": BytesStorageMetadata()}))
    assert time.process_time() - start < 0.3


# Metadata that does not place the record.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"python": 1}, "holds bytes"),
        (torch.zeros(9), r"holds torch.float32 \(9,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), r"holds torch.int64 \(2, 3\)"),
    ],
)
def test_something_else_under_the_key_is_refused_unread(
    value: Any, message: str, tmp_path: Path
) -> None:
    dcp.save({"rng": {KEY: [value] if isinstance(value, dict) else value}}, checkpoint_id=tmp_path)
    if isinstance(value, dict):
        dcp.save({"rng": {KEY: "pickled"}}, checkpoint_id=tmp_path)
    rng = StatefulRNG(1)
    with unmoved(), pytest.raises(CheckpointException, match=rf"rng\.rng_streams: .*{message}"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner())


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_record_that_the_metadata_does_not_place_is_an_error(chunks: int, tmp_path: Path) -> None:
    """To DCP a tensor with no chunks is nothing to read, and the live state would stay."""
    rng = StatefulRNG(1)
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)

    def empty_chunks(metadata: Any) -> None:
        empty = ChunkStorageMetadata(torch.Size((0,)), torch.Size((0,)))
        metadata.state_dict_metadata["rng.rng_streams"].chunks[:] = [empty] * chunks

    change_metadata(tmp_path, empty_chunks)
    draw()
    with unmoved(), pytest.raises(CheckpointException, match=f"in {chunks} chunks, expected"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner())


def test_a_record_of_other_generators_needs_the_planner(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    dcp.save({"rng": without(rng.state_dict(), "numpy")}, checkpoint_id=tmp_path)
    expected = draw()
    with unmoved(), pytest.raises(CheckpointException, match="Size mismatch between saved"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path)
    untouched = float(np.random.random())
    np.random.seed(5)
    messages = warned(
        lambda: dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner())
    )
    assert "the checkpoint has no numpy: the stream stays as it is" in messages[0]
    found = draw()
    assert (found[0::3], found[2::3]) == (expected[0::3], expected[2::3])
    assert untouched not in found
    assert "numpy" in record_of(rng.state_dict()).streams
