"""Which row each rank is given, for any two numbers of rows, in one process with a fake group."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from nemo_rng_dcp.layout import Layout
from streams import draw, unmoved

FakeGroup = Callable[[int, int], None]

pytestmark = pytest.mark.filterwarnings("ignore")


def save(rows: int, ranked: bool, path: Path, fake_group: FakeGroup) -> list[list[float]]:
    """Write the checkpoint of a job of ``rows`` ranks; returns what each would draw next."""
    streams = []
    tables: dict[str, list[torch.Tensor]] = {}
    for rank in range(rows):
        fake_group(rank, rows)
        rng = StatefulRNG(42, ranked=ranked)
        draw(rank % 3 if ranked else 1)
        for name, table in rng.state_dict().items():
            assert isinstance(table, DTensor)
            tables.setdefault(name, []).append(table.to_local())
        streams.append(draw())
    whole = {name: torch.cat(parts) for name, parts in tables.items()}
    dcp.save({"rng": whole}, checkpoint_id=path, no_dist=True)
    return streams


def load(rows: int, ranked: bool, path: Path, fake_group: FakeGroup) -> list[list[float]]:
    streams = []
    for rank in range(rows):
        fake_group(rank, rows)
        rng = StatefulRNG(1000, ranked=ranked)
        dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner(), no_dist=True)
        streams.append(draw())
    return streams


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(saved=st.integers(1, 5), loaded=st.integers(1, 9), ranked=st.booleans())
def test_every_rank_gets_its_row_or_a_stream_of_its_own(
    saved: int, loaded: int, ranked: bool, fake_group: FakeGroup
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = save(saved, ranked, Path(folder), fake_group)
        found = load(loaded, ranked, Path(folder), fake_group)
        assert load(loaded, ranked, Path(folder), fake_group) == found
    assert found[:saved] == expected[:loaded]
    if ranked:
        numbers = [number for stream in [*expected, *found[saved:]] for number in stream]
        assert len(set(numbers)) == len(numbers)
    else:
        assert found == [expected[0]] * loaded


def test_a_row_that_the_metadata_does_not_place_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To DCP a tensor with no chunks is nothing to read, and the live state would stay."""
    rng = StatefulRNG(1)
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    real = dcp.FileSystemReader.read_metadata

    def without_chunks(self: Any, *arguments: Any, **options: Any) -> Any:
        metadata = real(self, *arguments, **options)
        metadata.state_dict_metadata["rng.numpy"].chunks.clear()
        return metadata

    monkeypatch.setattr(dcp.FileSystemReader, "read_metadata", without_chunks)
    draw()
    with unmoved(), pytest.raises(CheckpointException, match=r"rng\.numpy: .* 0 chunks for row 0"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner())


@pytest.mark.parametrize("planner_class", [RNGLoadPlanner, dcp.DefaultLoadPlanner])
def test_a_checkpoint_of_torch_2_3_loads_as_with_the_default_planner(
    planner_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    dcp.load(state, checkpoint_id=tmp_path, planner=planner_class())
    assert state["options"] == {"rate": 1.5}
    assert draw() == expected


@pytest.mark.parametrize(
    ("keys", "error"),
    [("rng", TypeError), ((), ValueError), ((1,), TypeError), (iter(()), ValueError)],
)
def test_keys_are_a_sequence_of_paths(keys: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="keys is"):
        RNGLoadPlanner(keys=keys)


def test_keys_may_come_from_an_iterator_and_count_once() -> None:
    assert RNGLoadPlanner(keys=iter(["a", "b", "a"])).keys == ("a", "b")  # type: ignore[arg-type]


def test_rank_0_warns_whatever_its_row(tmp_path: Path, fake_group: FakeGroup) -> None:
    save(4, True, tmp_path, fake_group)
    for rank, row in ((0, 1), (2, 0)):
        fake_group(rank, 4)
        mesh = DeviceMesh("cpu", [[2, 3], [0, 1]], mesh_dim_names=("dp", "tp"))["dp"]
        rng = StatefulRNG(1000, ranked=True, mesh=mesh)
        assert Layout.current(mesh).row == row
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner(), no_dist=True)
        texts = [str(warning.message) for warning in caught]
        assert sum("4 rows were saved and 2 are loaded" in text for text in texts) == (rank == 0)
