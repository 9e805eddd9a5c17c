"""A record saved by itself, and found in whatever checkpoint holds one."""

import datetime
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGStateError, RNGStateWarning, StatefulRNG
from nemo_rng_dcp.record import KEY
from nemo_rng_dcp.table import NOT_SAVED
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
    rng = StatefulRNG(1, ranked=True)
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
    dcp.save({"b": second, "a": first}, checkpoint_id=tmp_path)
    rng = StatefulRNG(3)
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.load(tmp_path)
    assert "2 records" in str(caught.value)
    assert "key='a.rng_streams'" in str(caught.value)
    assert "key='b.rng_streams'" in str(caught.value)
    with unmoved(), pytest.raises(RNGStateError, match=r"no record 'c', only .*a\.rng_streams"):
        rng.load(tmp_path, key="c")
    assert rng.loaded is None
    dcp.save({"b": StatefulRNG(2), "a": 1}, checkpoint_id=tmp_path)
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
        assert "holds no record (rng_streams) of a StatefulRNG, only weight" in error
        assert str(tmp_path) in error


def test_without_a_checkpoint_every_rank_names_the_place(tmp_path: Path) -> None:
    for error in job(2, load_fails, tmp_path / "missing"):
        assert str(tmp_path / "missing") in error


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
    dcp.save({"weight": torch.rand(3)}, checkpoint_id=tmp_path / "one")
    for path in (tmp_path / "by_rank", f"file://{tmp_path}/one"):
        with pytest.raises(RNGStateError, match=r"other things \(weight, for one\)"):
            StatefulRNG(1).save(path)


def test_nor_is_a_tensor_that_only_has_the_name_of_a_record(tmp_path: Path) -> None:
    weight = torch.arange(6).reshape(2, 3)
    dcp.save({"w": {KEY: weight}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(RNGStateError, match=r"other things \(w.rng_streams, for one\)"):
        StatefulRNG(1).save(tmp_path)
    state = {"w": {KEY: torch.zeros_like(weight)}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["w"][KEY], weight)


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
    with pytest.raises(RNGStateError, match=r"the checkpoint in .* cannot be read") as caught:
        StatefulRNG(1).save(tmp_path)
    assert "Traceback" not in str(caught.value)
    assert (tmp_path / ".metadata").read_bytes() == b"junk"


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
        raise OSError("no space left")


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
def test_a_save_over_another_that_fails_leaves_no_record_of_two_moments(tmp_path: Path) -> None:
    for _, error in job(2, saved_twice, tmp_path, "write"):
        assert f"was not saved to {tmp_path} (rank 1): OSError: no space left" in error
    for error in job(2, load_fails, tmp_path):
        assert ".metadata" in error


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


def test_nothing_was_loaded_where_the_load_restored_nothing() -> None:
    rng = StatefulRNG(1)
    with pytest.warns(RNGStateWarning, match="restored no random stream") as caught:
        rng.load_state_dict(rng.state_dict())
    assert caught[0].filename == __file__
    assert rng.loaded is None


def test_a_load_that_restores_nothing_forgets_the_one_before() -> None:
    """Or a rewind would repeat what was drawn since then."""
    rng = StatefulRNG(1)
    rng.load_state_dict({KEY: rng.state_dict()[KEY].clone()})
    assert rng.loaded is not None
    draw()
    with unmoved(), pytest.warns(RNGStateWarning, match="restored no random stream"):
        rng.load_state_dict({KEY: NOT_SAVED})
    assert rng.loaded is None
    with unmoved(), pytest.raises(RuntimeError, match="nothing was loaded yet"):
        rng.rewind()


# What frameworks that do not know of rows make of a state_dict().


def loads_a_whole_table(path: Path) -> tuple[Numbers, list[str]]:
    rng = StatefulRNG(1, ranked=True)
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
