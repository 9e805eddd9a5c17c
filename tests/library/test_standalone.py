"""A record saved by itself, and found in whatever checkpoint holds one."""

import datetime
import io
import logging
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_rng_dcp import RNGStateError, RNGStateWarning, StatefulRNG
from nemo_rng_dcp.record import KEY
from tests.support.jobs import begin_group, job
from tests.support.streams import draw, unmoved, warned

Numbers = list[float]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def saved_alone(path: Path) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    draw(dist.get_rank() + 1)
    with unmoved():
        rng.save(path)
    return draw()


def loaded_from(path: Path, key: str | None = None) -> tuple[Numbers, list[str]]:
    """Load in a process that drew otherwise: what follows, and what was warned."""
    rng = StatefulRNG(42, ranked=True)
    draw(5)
    messages = warned(lambda: rng.load(path, key=key))
    assert rng.loaded is not None
    return draw(), messages


def test_every_rank_regains_its_stream_on_as_many_ranks(tmp_path: Path) -> None:
    expected = job(2, saved_alone, tmp_path)
    assert job(2, loaded_from, tmp_path) == [(numbers, []) for numbers in expected]
    assert expected[0] != expected[1]


def test_the_checkpoint_holds_the_record_and_nothing_else(tmp_path: Path) -> None:
    StatefulRNG(42).save(tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    assert list(metadata.state_dict_metadata) == ["rng_streams"]


def test_shrinking_continues_rows_and_names_the_dropped_ones(tmp_path: Path) -> None:
    expected = job(2, saved_alone, tmp_path)
    [(found, messages)] = job(1, loaded_from, tmp_path)
    assert found == expected[0]
    assert len(messages) == 1
    assert "row 1 is dropped" in messages[0]


def test_growing_continues_rows_and_forks_the_new_one(tmp_path: Path) -> None:
    expected = job(2, saved_alone, tmp_path)
    found = job(3, loaded_from, tmp_path)
    assert [numbers for numbers, _ in found[:2]] == expected
    assert found[2][0] not in expected
    assert [len(messages) for _, messages in found] == [1, 0, 0]
    assert "row 2 is new" in found[0][1][0]


def saved_in_a_job(path: Path, place: Callable[[StatefulRNG], dict[str, Any]]) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    draw(dist.get_rank() + 1)
    dcp.save(place(rng), checkpoint_id=path)
    return draw()


def beside_a_model(rng: StatefulRNG) -> dict[str, Any]:
    # A weight of the record's name is no record.
    return {"model": {"rng_streams": torch.ones(3), "pickled": {1}}, "rng": rng}


def nested(rng: StatefulRNG) -> dict[str, Any]:
    return {"app": {"parts": [{"rng": rng.state_dict()}]}}


def at_the_top_level(rng: StatefulRNG) -> dict[str, Any]:
    return {"weight": torch.ones(3), **rng.state_dict()}


@pytest.mark.parametrize("place", [beside_a_model, nested, at_the_top_level])
def test_the_record_is_found_wherever_it_lies(
    place: Callable[[StatefulRNG], dict[str, Any]], tmp_path: Path
) -> None:
    expected = job(2, saved_in_a_job, tmp_path, place)
    assert job(2, loaded_from, tmp_path) == [(numbers, []) for numbers in expected]


def test_the_record_is_found_in_a_converted_checkpoint_on_any_world_size(tmp_path: Path) -> None:
    expected = job(2, saved_in_a_job, tmp_path / "dcp", nested)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    torch_save_to_dcp(tmp_path / "whole.pt", tmp_path / "again")
    assert [numbers for numbers, _ in job(3, loaded_from, tmp_path / "again")[:2]] == expected


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_of_several_records_one_must_be_chosen(tmp_path: Path) -> None:
    first, second = StatefulRNG(1), StatefulRNG(2)
    expected = draw()
    records = {"b": second.state_dict(), "a": first.state_dict()}
    dcp.save({"app": records}, checkpoint_id=tmp_path)
    rng = StatefulRNG(3)
    with unmoved(), pytest.raises(RNGStateError, match="2 records: choose one with ") as caught:
        rng.load(tmp_path)
    assert "key='app.a.rng_streams'" in str(caught.value)
    assert "key='app.b.rng_streams'" in str(caught.value)
    dcp.save({f"{KEY}@{n}": first.state_dict()[KEY] for n in (1, 2)}, checkpoint_id=tmp_path)
    of_others = (
        r"2 records, none of them of this grid of ranks \(rng_streams\): choose one with key="
    )
    refused(lambda: rng.load(tmp_path), of_others)
    dcp.save({"b": StatefulRNG(2), "a": 1}, checkpoint_id=tmp_path)
    with unmoved(), pytest.raises(RNGStateError, match=r"no record 'c', only b\.rng_streams"):
        rng.load(tmp_path, key="c")
    assert rng.loaded is None
    rng.load(tmp_path, key="b.rng_streams")
    assert draw() == expected


def load_fails(path: Path) -> str:
    rng = StatefulRNG(1, ranked=True)
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.load(path)
    assert rng.loaded is None
    return str(caught.value)


def test_without_a_record_every_rank_names_what_is_there(tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    for error in job(2, load_fails, tmp_path):
        assert "holds no record (rng_streams) of a StatefulRNG, only weight. Load" in error
        assert str(tmp_path) in error
    for count, named in ((0, "nothing"), (5, "0, 1, 2, 3, 4"), (6, "0, 1, 2, 3, 4, ...")):
        dcp.save({str(n): torch.ones(1) for n in range(count)}, checkpoint_id=tmp_path / named)
        assert f"of a StatefulRNG, only {named}. Load" in load_fails(tmp_path / named)


def test_without_a_checkpoint_every_rank_names_the_place(tmp_path: Path) -> None:
    for error in job(2, load_fails, tmp_path / "missing"):
        assert str(tmp_path / "missing") in error


def without_collectives(path: Path) -> None:
    rng = StatefulRNG(1, ranked=True)
    dcp.save({"rng": rng}, checkpoint_id=path, use_collectives=False)
    expected = draw()
    if dist.is_initialized():
        dist.barrier()
    rng.load(path)
    assert draw() == expected


def test_a_record_saved_without_collectives_is_loaded_by_its_rank(tmp_path: Path) -> None:
    without_collectives(tmp_path / "alone")
    job(2, without_collectives, tmp_path / "two")


def save_fails(path: Path) -> str:
    with pytest.raises(RNGStateError) as caught:
        StatefulRNG(1, ranked=True).save(path)
    return str(caught.value)


def test_a_checkpoint_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    weight = torch.rand(3)
    dcp.save({"weight": weight}, checkpoint_id=tmp_path, no_dist=True)
    for error in job(2, save_fails, tmp_path):
        assert "other things (weight, for one), which would be lost" in error
        assert f"{tmp_path}/rng" in error
    state = {"weight": torch.zeros(3)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["weight"], weight)


def test_other_things_behind_a_url_or_saved_by_rank_are_not_replaced(
    tmp_path: Path,
) -> None:
    writer = dcp.FileSystemWriter(tmp_path / "by_rank")
    dcp.save({"weight": torch.rand(3)}, storage_writer=writer, use_collectives=False)
    with pytest.raises(
        RNGStateError, match=r"by_rank holds __0\.metadata, __0_0\.distcp: files of"
    ):
        StatefulRNG(1).save(tmp_path / "by_rank")
    two = {"weight": torch.rand(3), "weights": torch.rand(3)}
    dcp.save(two, checkpoint_id=tmp_path / "one")
    with pytest.raises(RNGStateError, match=r"other things \(weight, for one\)"):
        StatefulRNG(1).save(f"file://{tmp_path}/one")


def test_nor_is_a_tensor_that_only_has_the_name_of_a_record(tmp_path: Path) -> None:
    weight = torch.arange(6).reshape(2, 3)
    dcp.save({"w": {KEY: weight}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(RNGStateError, match=r"other things \(w.rng_streams, for one\)"):
        StatefulRNG(1).save(tmp_path)
    state = {"w": {KEY: torch.zeros_like(weight)}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["w"][KEY], weight)


def test_nor_is_the_record_of_an_application_beside_one_by_itself(tmp_path: Path) -> None:
    record = StatefulRNG(1).state_dict()
    dcp.save({**record, "app": record}, checkpoint_id=tmp_path, no_dist=True)
    refused(lambda: StatefulRNG(1).save(tmp_path), r"other things \(app.rng_streams, for one\)")


def test_the_first_three_files_that_are_in_the_way_are_named(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    for count, shown in ((3, "0, 1, 2"), (4, "0, 1, 2, ...")):
        (tmp_path / str(count)).mkdir()
        for name in map(str, range(count)):
            (tmp_path / str(count) / name).touch()
        text = refused(lambda path=tmp_path / str(count): rng.save(path), "would be lost")  # type: ignore[misc]
        assert f" holds {shown}: files of another checkpoint" in text
        text = refused(lambda path=tmp_path / str(count): rng.load(path), "did not finish")  # type: ignore[misc]
        assert f"no .metadata in it, only {shown}. Its save" in text


def test_a_key_may_be_named_as_inspect_shows_it(tmp_path: Path) -> None:
    rng, other = (StatefulRNG(1, generators={"own": random.Random(n)}) for n in range(2))
    dcp.save({"a": rng, "b": other}, checkpoint_id=tmp_path, no_dist=True)
    expected = other.fingerprint()
    for key in ("b", f"b.{KEY}"):
        rng.load(tmp_path, key=key)
        assert rng.fingerprint() == expected


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_a_checkpoint_that_cannot_be_read_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"junk")
    with pytest.raises(RNGStateError, match=r"cannot be read \(UnpicklingError: ") as caught:
        StatefulRNG(1).save(tmp_path)
    assert "Traceback" not in str(caught.value)
    assert (tmp_path / ".metadata").read_bytes() == b"junk"
    message = r"its metadata cannot be read: UnpicklingError: .*storage_reader=\.\.\."
    refused(lambda: StatefulRNG(1).load(tmp_path), message)
    StatefulRNG(1).save(tmp_path / "cut")
    (data,) = (tmp_path / "cut").glob("rng-*")
    data.write_bytes(b"")
    refused(
        lambda: StatefulRNG(1).save(tmp_path / "cut"), r"cannot be read \((?!Checkpoint)\w+Error"
    )


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_record_saved_before_is_replaced(scheme: str, tmp_path: Path) -> None:
    path = f"{scheme}{tmp_path}"
    rng = StatefulRNG(1)
    rng.save(path)
    draw()
    rng.save(path)
    expected = draw()
    rng.load(path)
    assert draw() == expected


class FailingWriter(dcp.FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left\nof what there was")


def saved_twice(path: Path, second: str) -> tuple[Numbers, str]:
    """Save two moments to one folder; rank 1 fails in the second save."""
    rng = StatefulRNG(42, ranked=True)
    rng.save(path)
    expected = draw()
    fails = dist.get_rank() == 1
    writer = FailingWriter(path) if fails and second == "write" else None
    if fails and second == "state":
        np.random.set_bit_generator(np.random.PCG64())  # type: ignore[attr-defined]
    with pytest.raises(RNGStateError) as caught:
        rng.save(path, storage_writer=writer)
    return expected, str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_a_save_over_another_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    expected, errors = zip(*job(2, saved_twice, tmp_path, "write"), strict=True)
    for error in errors:
        assert error.endswith(f"was not saved to {tmp_path} (rank 1): OSError: no space left")
    assert job(2, loaded_from, tmp_path) == [(numbers, []) for numbers in expected]
    # The next save takes away what both have left.
    job(2, saved_alone, tmp_path)
    assert len(list(tmp_path.glob("rng-*"))) == 2


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_a_rank_without_a_record_fails_the_save_on_all_and_the_last_one_stays(
    tmp_path: Path,
) -> None:
    expected, errors = zip(*job(2, saved_twice, tmp_path, "state"), strict=True)
    for error in errors:
        assert f"was not saved to {tmp_path} (rank 1): numpy: the generator runs PCG64" in error
    assert job(2, loaded_from, tmp_path) == [(numbers, []) for numbers in expected]


def seeded_before_the_group(path: Path) -> list[str]:
    """Rank 1 is seeded for row 0; rank 0 is as well, and that is its own."""
    rank = os.environ.pop("RANK")
    rng = StatefulRNG(42, ranked=True)
    os.environ["RANK"] = rank
    begin_group()
    errors: list[str] = []
    functions: list[Callable[[Path], None]] = [rng.save, rng.load]
    for function in functions:
        with pytest.raises(RNGStateError) as caught:
            function(path / "rng")
        errors.append(str(caught.value))
    return errors


def test_a_rank_of_another_row_fails_the_save_and_the_load_on_all(tmp_path: Path) -> None:
    job(1, saved_alone, tmp_path / "rng")
    for errors in job(2, seeded_before_the_group, tmp_path, group=False):
        for error in errors:
            assert "(rank 1): RuntimeError: this StatefulRNG was seeded for row 0" in error


def test_storage_that_fails_is_an_exception_of_the_library(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rng = StatefulRNG(1)
    message = r"was not saved to .*file/rng \(rank 0\): NotADirectoryError"
    with unmoved(), pytest.raises(RNGStateError, match=message):
        rng.save(tmp_path / "file" / "rng")


class AskingWriter(dcp.FileSystemWriter):
    """Asks whether its rank coordinates the save, and tells nothing of itself: both are allowed."""

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.coordinates = planner.is_coordinator
        return super().write_data(plan, planner)


def test_a_path_is_the_place_of_a_writer_and_a_reader_of_another_one(tmp_path: Path) -> None:
    rng, place, writer = StatefulRNG(1), tmp_path / "place", AskingWriter(tmp_path / "other")
    rng.save(place, storage_writer=writer)
    expected = draw()
    rng.load(place, storage_reader=dcp.FileSystemReader(tmp_path / "other"))
    assert draw() == expected
    assert writer.coordinates is True


def test_another_storage_is_written_and_read(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    rng.save(storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))
    assert list(tmp_path.glob("*.safetensors"))
    expected = draw()
    rng.load(storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
    assert draw() == expected


def test_registered_generators_come_along(tmp_path: Path) -> None:
    noise = random.Random(1)
    rng = StatefulRNG(1, generators={"noise": noise})
    rng.save(tmp_path)
    expected = noise.random()
    rng.load(tmp_path)
    assert noise.random() == expected


def on_a_mesh(path: Path) -> tuple[Numbers, Numbers]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rng = StatefulRNG(1, ranked=True, mesh=mesh["dp"])
    rng.save(path)
    expected = draw()
    rng.load(path)
    return expected, draw()


def test_ranks_that_share_a_row_load_it_together(tmp_path: Path) -> None:
    found = job(4, on_a_mesh, tmp_path)
    assert all(before == after for before, after in found)
    assert found[0] == found[1] != found[2]


def test_loaded_describes_what_was_restored(tmp_path: Path) -> None:
    before = datetime.datetime.now(datetime.timezone.utc)
    job(2, saved_alone, tmp_path)
    after = datetime.datetime.now(datetime.timezone.utc)
    rng = StatefulRNG(1)
    assert rng.loaded is None
    with pytest.warns(RNGStateWarning, match="row 1 is dropped"):
        rng.load(tmp_path)
    assert rng.loaded is not None
    assert (rng.loaded.rows, rng.loaded.world_size) == (2, 2)
    assert rng.loaded.saved_at is not None
    assert before <= rng.loaded.saved_at <= after


# What is already there.


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def refused(save: Callable[[], None], what: str) -> str:
    with pytest.raises(RNGStateError, match=what) as caught:
        save()
    return str(caught.value)


def test_a_models_safetensors_stay(tmp_path: Path) -> None:
    def writer() -> dcp.HuggingFaceStorageWriter:
        return dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)

    dcp.save({"weight": torch.ones(3)}, storage_writer=writer())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    refused(lambda: StatefulRNG(1).save(storage_writer=writer()), "holds shard-.*which would be")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_writer_that_names_its_files_itself_takes_an_empty_folder_alone(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    rng.save(tmp_path)
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    refused(lambda: rng.save(storage_writer=writer), "HuggingFaceStorageWriter names its files")
    rng.load(tmp_path)


class ElsewhereWriter(dcp.FileSystemWriter):
    """Stands for a client of a remote store: its name for a place is no path."""

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage)
        self.name = name

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.name)


@pytest.mark.parametrize("name", ["s3://bucket/run/rng", "rng"])
def test_the_writers_own_storage_is_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = StatefulRNG(1)
    rng.save("rng")  # a local folder that has nothing to do with the remote one
    before = files(tmp_path / "rng")
    for _ in range(2):
        rng.save(storage_writer=ElsewhereWriter(tmp_path / "remote", name))
    assert files(tmp_path / "rng") == before
    assert len(files(tmp_path / "remote")) == 2
    rng.load("rng")
    rng.load("remote")


class SlowWriter(dcp.FileSystemWriter):
    """Has written its data, and its metadata not yet."""

    written, go_on = threading.Event(), threading.Event()

    def finish(self, metadata: Metadata, results: Any) -> None:
        self.written.set()
        assert self.go_on.wait(60)
        super().finish(metadata, results)


def beside_a_save_that_runs(path: Path) -> str:
    state = {"weight": torch.arange(9.0)}
    future = dcp.async_save(state, storage_writer=SlowWriter(path))
    assert SlowWriter.written.wait(60)
    group = dist.new_group(backend="gloo")
    with pytest.raises(RNGStateError) as caught:
        StatefulRNG(1).save(path, process_group=group)
    SlowWriter.go_on.set()
    future.result()  # type: ignore[union-attr]
    found = {"weight": torch.zeros(9)}
    dcp.load(found, checkpoint_id=path)
    assert torch.equal(found["weight"], state["weight"])
    return str(caught.value)


def test_a_save_that_is_still_running_in_the_folder_is_not_disturbed(tmp_path: Path) -> None:
    [text] = job(1, beside_a_save_that_runs, tmp_path)
    assert f"{tmp_path} holds __0_0.distcp: files of another checkpoint, or of a save" in text


class OvertakenWriter(dcp.FileSystemWriter):
    """Another save begins in the folder while the record is written."""

    def write_data(self, *arguments: Any) -> Any:
        dcp.save({"weight": torch.ones(3)}, checkpoint_id=self.path)
        return super().write_data(*arguments)


def test_nor_is_one_that_begins_while_the_record_is_written(tmp_path: Path) -> None:
    writer = OvertakenWriter(tmp_path)
    refused(lambda: StatefulRNG(1).save(storage_writer=writer), "holds __0_0.distcp")
    assert files(tmp_path) == [".metadata", "__0_0.distcp"]
    found = {"weight": torch.zeros(3)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert found["weight"].tolist() == [1, 1, 1]


def test_the_record_of_other_generators_stays(tmp_path: Path) -> None:
    rng = StatefulRNG(1, device="cpu")
    rng.save(tmp_path)
    expected = draw()
    other = StatefulRNG(
        1, generators={"noise": random.Random(1)}, global_generators=False, device="cpu"
    )
    text = refused(lambda: other.save(tmp_path), "the record of another StatefulRNG")
    assert "streams of numpy, python, torch" in text
    # The same streams and one more: nothing gets lost.
    more = StatefulRNG(1, generators={"noise": random.Random(1)}, device="cpu")
    rng.load(tmp_path)
    assert draw() == expected
    more.save(tmp_path)
    refused(lambda: rng.save(tmp_path), "streams of noise")


def of_two_meshes(path: Path) -> str:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    noise: dict[str, Any] = {"generators": {"noise": random.Random(1)}, "global_generators": False}
    StatefulRNG(1, mesh=mesh["dp"], **noise).save(path)
    with pytest.raises(RNGStateError) as caught:
        StatefulRNG(1, mesh=mesh["tp"], **noise).save(path)
    return str(caught.value)


def test_the_record_of_another_mesh_stays(tmp_path: Path) -> None:
    for text in job(2, of_two_meshes, tmp_path):
        assert "the record of another StatefulRNG (rows along mesh dp)" in text


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_folders_below_and_hidden_files_are_no_obstacle(scheme: str, tmp_path: Path) -> None:
    path = f"{scheme}{tmp_path}"
    rng = StatefulRNG(1)
    (tmp_path / ".nfs0001").touch()
    (tmp_path / "rng-folder").mkdir()
    for _ in range(2):
        rng.save(path)
        rng.save(f"{path}/more")
    rng.load(path)
    assert len(files(tmp_path)) == 5


def to_places_of_their_own(path: Path) -> list[str]:
    rng, rank = StatefulRNG(1), dist.get_rank()
    own, same = path / f"step-{rank}", str(path / "same")
    places: list[tuple[Any, Any]] = [
        (own, None),
        ("rng", None),
        (own, AskingWriter(path)),
        (None, ElsewhereWriter(path, f"s3://bucket/{rank}")),
    ]
    (path / str(rank)).mkdir()
    os.chdir(path / str(rank))
    messages = []
    for place, writer in places:
        with pytest.raises(RNGStateError, match="ranks name different places") as caught:
            rng.save(place, storage_writer=writer)
        messages.append(str(caught.value))
    rng.save(storage_writer=ElsewhereWriter(Path(same), "s3://bucket/same"))
    rng.save(same)
    # And what they read: one of them finds another checkpoint.
    if rank == 1:
        dcp.save({"rng": rng.state_dict()}, checkpoint_id=path / "other", no_dist=True)
        record = next(iter(rng.state_dict().values()))
        dcp.save({KEY: record.to_local()}, checkpoint_id=path / "alone", no_dist=True)  # type: ignore[operator]
    dist.barrier()
    with unmoved(), pytest.raises(RNGStateError, match="ranks read different checkpoints"):
        rng.load(path / "alone" if rank else same)
    return messages


def test_ranks_that_name_different_places_are_told_before_anything_is_written(
    tmp_path: Path,
) -> None:
    for messages in job(2, to_places_of_their_own, tmp_path):
        assert f"rank 0 {tmp_path}/step-0, rank 1 {tmp_path}/step-1" in messages[0]
        assert f"rank 0 {tmp_path}/0/rng, rank 1 {tmp_path}/1/rng" in messages[1]
        assert f"rank 0 {tmp_path}/step-0, rank 1 {tmp_path}/step-1" in messages[2]
        assert "rank 0 s3://bucket/0, rank 1 s3://bucket/1" in messages[3]
    assert {name.partition("/")[0] for name in files(tmp_path)} == {"same", "other", "alone"}


# Interrupts.


class InterruptedWriter(dcp.FileSystemWriter):
    def write_data(self, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return super().write_data(*arguments)


class EndingReader(dcp.FileSystemReader):
    def read_data(self, *arguments: Any) -> Any:
        raise SystemExit(143)  # as a SIGTERM handler does


def interrupted(path: Path) -> list[str]:
    rng, own = StatefulRNG(1), dist.get_rank() == 1
    with pytest.raises(KeyboardInterrupt if own else RNGStateError) as saving:
        rng.save(storage_writer=(InterruptedWriter if own else dcp.FileSystemWriter)(path))
    rng.save(path)
    with unmoved(), pytest.raises(SystemExit if own else RNGStateError) as loading:
        rng.load(storage_reader=(EndingReader if own else dcp.FileSystemReader)(path))
    if own:
        assert loading.value.code == 143  # type: ignore[union-attr]
    return [str(saving.value), str(loading.value)]


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_an_interrupt_stays_one_and_the_other_ranks_are_told(tmp_path: Path) -> None:
    saving, loading = job(2, interrupted, tmp_path)[0]
    assert "(rank 1): KeyboardInterrupt" in saving
    assert "(rank 1): SystemExit: 143" in loading


# A part of the ranks, another moment, another thread.


def by_two_of_three(path: Path) -> tuple[Numbers, Numbers, list[str]] | str:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="this rank is not in process_group") as outside:
            StatefulRNG(1).save(path, process_group=group)
        return str(outside.value)
    mesh = DeviceMesh.from_group(group, "cpu", [1, 2], mesh_dim_names=("dp",))
    rng = StatefulRNG(1, ranked=True, mesh=mesh)
    rng.save(path, process_group=group)
    expected = draw()
    rng.load(path, process_group=group)
    found = draw()
    (missing,) = warned(lambda: rng.load(path / "nowhere", missing_ok=True, process_group=group))
    rank = dist.get_rank()
    of_all = StatefulRNG(1, ranked=True)
    calls: list[Callable[[], None]] = [
        lambda: of_all.save(path / "all", process_group=group),
        lambda: rng.save(path / str(rank), process_group=group),
        lambda: rng.load(path / "nowhere" if rank == 2 else path, process_group=group),
    ]
    return expected, found, [missing, *(refused(call, "") for call in calls)]


def test_a_part_of_the_ranks_saves_and_loads_with_its_group(tmp_path: Path) -> None:
    for expected, found, (missing, lacking, places, other) in job(3, by_two_of_three, tmp_path)[1:]:
        assert expected == found
        assert "restored no random stream" in missing
        assert "the ranks [0, 1, 2] have rows, and of these process_group lacks [0]" in lacking
        assert "mesh= of the group's ranks" in lacking
        assert f"rank 1 {tmp_path}/1, rank 2 {tmp_path}/2" in places
        assert "(rank 2): no checkpoint at" in other


def without_the_other_rank(path: Path) -> str:
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    rng = StatefulRNG(1)
    if dist.get_rank() == 1:
        return ""
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.save(path, process_group=group)
    return str(caught.value)


def test_a_rank_that_does_not_call_is_an_error_within_the_time_out(tmp_path: Path) -> None:
    text, _ = job(2, without_the_other_rank, tmp_path)
    assert "Every rank of process_group has to call it" in text
    assert "pass process_group= for a part of the ranks" in text


def when_the_framework_says_saved(path: Path) -> tuple[bool, list[str]]:
    rng, beside = StatefulRNG(1, ranked=True), dist.new_group(backend="gloo")
    captured, expected = rng.state_dict(), rng.fingerprint()
    future: Any = dcp.async_save({"weight": torch.ones(9)}, checkpoint_id=path / "model")
    done, messages = threading.Event(), []

    def saved(_: Any) -> None:
        messages.extend(warned(lambda: rng.save(path / "late", process_group=beside)))
        messages.extend(
            warned(lambda: rng.save(path / "rng", state=captured, process_group=beside))
        )
        done.set()

    draw()  # training goes on
    future.add_done_callback(saved)
    assert done.wait(60)
    rng.load(path / "rng")
    return rng.fingerprint() == expected, messages


def test_the_state_of_an_earlier_moment_is_saved_on_another_thread(tmp_path: Path) -> None:
    for is_of_the_save, messages in job(2, when_the_framework_says_saved, tmp_path):
        assert is_of_the_save
        assert len(messages) == 1
        assert "another thread" in messages[0]
        assert "rng.save(path, state=captured)" in messages[0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"the state is \{\}, expected what state_dict\(\) returns"),
        ({"a": 1, "b": 2}, "expected what state_dict"),
        (5, "the state is 5, expected what state_dict"),
        ({"a": 1}, "was not saved to"),
        ({KEY: torch.zeros(3)}, "was not saved to"),
    ],
)
def test_a_state_that_is_none_of_a_stateful_rng_is_not_saved(
    state: Any, message: str, tmp_path: Path
) -> None:
    refused(lambda: StatefulRNG(1).save(tmp_path, state=state), message)
    assert files(tmp_path) == []


# Where nothing was saved yet, and where else it may be.


def first_resume(path: Path, missing_ok: bool) -> tuple[list[str], str, str]:
    rng = StatefulRNG(1)
    logged = io.StringIO()
    logging.basicConfig(stream=logged)

    def load() -> None:
        with unmoved():
            rng.load(path, missing_ok=missing_ok)

    if missing_ok:
        messages = warned(load)
        assert rng.loaded is None
        return messages, "", logged.getvalue()
    with pytest.raises(RNGStateError) as caught:
        load()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return [], str(caught.value), logged.getvalue()


@pytest.mark.parametrize("place", ["nowhere", "before"])
def test_at_the_first_resume_every_rank_says_in_a_line_how_to_go_on(
    place: str, tmp_path: Path
) -> None:
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path / "before", no_dist=True)
    for _, text, logged in job(2, first_resume, tmp_path / place, False):
        assert ("no checkpoint at" if place == "nowhere" else "only weight") in text
        assert str(tmp_path / place) in text
        assert "rng.load(path, missing_ok=True)" in text
        assert "\n" not in text
        assert logged == ""
    for messages, _, logged in job(2, first_resume, tmp_path / place, True):
        assert len(messages) == 1
        assert "restored no random stream" in messages[0]
        assert logged == ""


def where_one_rank_sees_nothing(path: Path) -> str:
    place = path / "rng" if dist.get_rank() == 0 else path / "nowhere"
    rng = StatefulRNG(1)
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.load(place, missing_ok=True)
    return str(caught.value)


def test_what_is_missing_for_one_rank_alone_is_an_error(tmp_path: Path) -> None:
    job(2, saved_alone, tmp_path / "rng")
    for text in job(2, where_one_rank_sees_nothing, tmp_path):
        assert "(rank 1): no checkpoint at" in text


def test_an_interrupted_save_is_not_missing(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    rng.save(tmp_path)
    (tmp_path / ".metadata").unlink()
    with unmoved(), pytest.raises(RNGStateError, match=r"no \.metadata in it, only rng-.*finish"):
        rng.load(tmp_path, missing_ok=True)
    with unmoved(), pytest.warns(RNGStateWarning, match="restored no random stream"):
        rng.load(tmp_path / "nowhere", missing_ok=True)
    rng.save(tmp_path)  # what is left of it is no obstacle
    rng.load(tmp_path)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("beside", [False, True])
def test_the_record_may_be_one_folder_below(beside: bool, tmp_path: Path) -> None:
    if beside:
        dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path / "optimizer", no_dist=True)
    expected = job(2, saved_alone, tmp_path / "rng")
    assert job(2, loaded_from, tmp_path) == [(numbers, []) for numbers in expected]
    rng = StatefulRNG(1)
    rng.save(tmp_path / "second")
    reader = dcp.FileSystemReader(tmp_path)
    with unmoved(), pytest.raises(RNGStateError, match=r"2 records, name one: .*/rng, .*/second"):
        rng.load(storage_reader=reader)
    assert reader.path == tmp_path, "it is asked about its own place next time"
    for number in range(5):
        rng.save(tmp_path / f"third-{number}")
    text = refused(lambda: rng.load(tmp_path), "holds 7 records")
    assert text.endswith(f"{tmp_path}/third-3"), "six are enough"


class ForeignWriter(dcp.FileSystemWriter):
    """Knows alone where in its storage a tensor is."""

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, [])


def test_where_another_writer_saved_the_message_asks_for_its_reader(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    dcp.save({"rng": rng}, storage_writer=ForeignWriter(tmp_path))
    text = refused(lambda: rng.load(tmp_path), r"rng\.load\(path, storage_reader=\.\.\.\)")
    reader = dcp.FileSystemReader(tmp_path)
    with_one = refused(lambda: rng.load(storage_reader=reader), "no record was loaded")
    assert text.partition(str(tmp_path))[2].startswith(with_one.partition(str(reader))[2])
    assert "storage_reader" not in with_one


class Without:
    """A writer, a reader or a file system that lacks something."""

    def __init__(self, whole: Any, *lacking: str) -> None:
        self._whole, self._lacking = whole, lacking

    def __getattr__(self, name: str) -> Any:
        if name in self._lacking:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.mark.parametrize("lacking", ["fs", "path"])
def test_a_storage_that_cannot_be_asked_is_written(lacking: str, tmp_path: Path) -> None:
    rng, writer = StatefulRNG(1), Without(dcp.FileSystemWriter(tmp_path), lacking)
    rng.save(storage_writer=writer)  # type: ignore[arg-type]
    expected = draw()
    rng.load(tmp_path)
    assert draw() == expected


def test_a_file_system_that_lists_nothing_is_asked_for_names(tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path / ".metadata")
    for name in (".metadata", "__0.metadata", "__0_0.distcp"):
        writer = dcp.FileSystemWriter(tmp_path / name)
        writer.fs = Without(writer.fs, "ls")  # type: ignore[assignment]
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / name).touch()
        what = "a checkpoint of other" if name == ".metadata" else f"{name}: files of another"
        refused(lambda writer=writer: StatefulRNG(1).save(storage_writer=writer), f"holds {what}")  # type: ignore[misc]


class Slashed(Without):
    """Ends the names of folders with a slash, as object stores do."""

    def ls(self, path: Any) -> list[str]:
        return [f"{name}/" if os.path.isdir(name) else str(name) for name in self._whole.ls(path)]


def test_a_folder_may_be_listed_with_a_slash(tmp_path: Path) -> None:
    rng, reader = StatefulRNG(1), dcp.FileSystemReader(tmp_path)
    rng.save(tmp_path / "rng")
    reader.fs = Slashed(reader.fs)  # type: ignore[assignment]
    expected = draw()
    rng.load(storage_reader=reader)
    assert draw() == expected


def test_the_default_device_has_no_part_in_it(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    with torch.device("meta"):
        rng.save(tmp_path)
        expected = rng.fingerprint()
        rng.load(tmp_path)
    assert rng.fingerprint() == expected


# What frameworks that do not know of rows make of a state_dict().


def loads_a_whole_table(path: Path) -> tuple[Numbers, list[str]]:
    rng = StatefulRNG(42, ranked=True)
    draw(5)
    messages = warned(lambda: rng.load_state_dict(torch.load(path, weights_only=True)))
    return draw(), messages


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_whole_plain_table_is_loaded_on_any_world_size(size: int, tmp_path: Path) -> None:
    expected = job(2, saved_alone, tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    found = job(size, loads_a_whole_table, tmp_path / "whole.pt")
    planned = job(size, loaded_from, tmp_path / "dcp")
    assert found == planned
    assert [numbers for numbers, _ in found[:2]] == expected[:size]


def pickled_by_rank_0(path: Path) -> Numbers:
    """Save as Accelerate's register_for_checkpointing does."""
    rng = StatefulRNG(42, ranked=True)
    state = rng.state_dict()
    if dist.get_rank() == 0:
        torch.save(state, path)
    return draw()


def loads_the_pickle(path: Path) -> Numbers | str:
    rng = StatefulRNG(1, ranked=True)
    try:
        rng.load_state_dict(torch.load(path, weights_only=True))
    except RNGStateError as error:
        return str(error)
    return draw()


@pytest.mark.parametrize("size", [2, 3])
def test_a_table_pickled_by_one_rank_is_refused_by_the_others(size: int, tmp_path: Path) -> None:
    expected = job(2, pickled_by_rank_0, tmp_path / "rng.pt")
    found = job(size, loads_the_pickle, tmp_path / "rng.pt")
    assert found[0] == expected[0]
    error = found[1]
    assert isinstance(error, str)
    assert "row 1 of" in error
    assert "StatefulRNG.save()" in error
