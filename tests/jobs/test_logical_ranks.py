"""Checkpoints of logical ranks on other numbers of processes, and of plain ranks."""

import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, ScopedRNG, StatefulRNG
from tests.support.command import ask
from tests.support.jobs import job
from tests.support.streams import draw, warned

Drawn = dict[int, list[float]]

COUNT = 8


def merged(drawn: list[Drawn]) -> Drawn:
    ranks = [rank for of_process in drawn for rank in of_process]
    assert len(set(ranks)) == len(ranks)
    return {rank: numbers for of_process in drawn for rank, numbers in of_process.items()}


def by_rank(rng: StatefulRNG) -> Drawn:
    drawn = {}
    for rank in rng.ranks:
        with rng.as_rank(rank):
            drawn[rank] = draw()
    return drawn


@contextmanager
def nothing_warned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch")
        yield


def begin(count: int | None = COUNT, **arguments: Any) -> StatefulRNG:
    rng = StatefulRNG(42, ranked=True, logical_ranks=count, **arguments)
    for rank in rng.ranks:
        with rng.as_rank(rank):
            draw(rank % 3)
    return rng


def save(path: Path, count: int | None = COUNT, way: str = "dcp") -> Drawn:
    rng = begin(count)
    state = {"rng": rng}
    if way == "async":
        writing = dcp.async_save(state, checkpoint_id=path)
        drawn = by_rank(rng)
        writing.result()
        return drawn
    if way == "own":
        rng.save(path)
    elif way == "safetensors":
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save({"rng": rng.state_dict()}, storage_writer=writer)
    else:
        dcp.save(state, checkpoint_id=path)
    return by_rank(rng)


def load(path: Path, count: int | None = COUNT, way: str = "dcp") -> Drawn:
    """Load in every way that there is for the checkpoint, in silence."""
    found = []
    with nothing_warned():
        for planner in (None, RNGLoadPlanner()) if way != "own" else ():
            rng = StatefulRNG(42, ranked=True, logical_ranks=count)
            if way == "safetensors":
                state = {"rng": rng.state_dict()}
                reader = HuggingFaceStorageReader(str(path))
                dcp.load(state, storage_reader=reader, planner=planner)
                rng.load_state_dict(state["rng"])
            else:
                dcp.load({"rng": rng}, checkpoint_id=path, planner=planner)
            found.append(by_rank(rng))
            assert rng.loaded is not None
            assert rng.loaded.rows == (count or dist.get_world_size())
        if way != "safetensors":
            rng = StatefulRNG(42, ranked=True, logical_ranks=count)
            rng.load(path)
            found.append(by_rank(rng))
    assert all(drawn == found[0] for drawn in found)
    return found[0]


@pytest.mark.parametrize(
    ("way", "size"), [("dcp", 4), ("async", 2), ("safetensors", 2), ("own", 1)]
)
def test_any_number_of_processes_continues(way: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    saved = merged(job(size, save, path, COUNT, way))
    assert sorted(saved) == list(range(COUNT))
    for other in (1, 2, 8) if way == "dcp" else (4,):
        assert merged(job(other, load, path, COUNT, way)) == saved


def test_what_plain_ranks_saved_continues_on_logical_ranks_and_back(tmp_path: Path) -> None:
    saved = merged(job(4, save, tmp_path / "plain", None))
    assert merged(job(2, load, tmp_path / "plain", 4)) == saved
    again = merged(job(2, save, tmp_path / "logical", 4))
    assert again == saved
    assert merged(job(4, load, tmp_path / "logical", None)) == saved


def test_the_metadata_has_a_chunk_for_each_process(tmp_path: Path) -> None:
    job(2, save, tmp_path)
    stored = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    entry = stored["rng.rng_streams"]
    assert isinstance(entry, TensorStorageMetadata)
    assert [chunk.sizes[0] * 2 for chunk in entry.chunks] == [entry.size[0]] * 2


def test_the_command_sees_the_same_rows_whatever_the_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (1, 4):
        job(size, save, tmp_path / str(size))
    code, printed = ask(capsys, "inspect", tmp_path / "4")
    assert (code, "rng: 8 rows of 4 ranks, seed 42, ranked" in printed) == (0, True)
    code, printed = ask(capsys, "diff", tmp_path / "1", tmp_path / "4")
    assert "rng: 8 rows compared, no stream differs" in printed


def load_other(path: Path, count: int, way: str) -> tuple[Drawn, list[str]]:
    rng = StatefulRNG(42, ranked=True, logical_ranks=count)

    def load() -> None:
        if way == "own":
            rng.load(path)
        else:
            dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())

    messages = warned(load)
    return by_rank(rng), messages


@pytest.mark.parametrize("way", ["planner", "own"])
def test_another_number_of_logical_ranks_follows_the_rules_of_a_resume(
    way: str, tmp_path: Path
) -> None:
    saved = merged(job(2, save, tmp_path))
    for count, size, said_first in [
        (4, 2, "RNG state: 8 rows were saved and 4 are loaded: rows 4 to 7 are dropped"),
        (12, 2, "RNG state: 8 rows were saved and 12 are loaded: rows 8 to 11 are new"),
        (6, 3, "RNG state: 8 rows were saved and 6 are loaded: rows 6 to 7 are dropped"),
    ]:
        results = job(size, load_other, tmp_path, count, way)
        drawn = merged([of_process for of_process, _ in results])
        common = min(count, COUNT)
        assert {rank: drawn[rank] for rank in range(common)} == {r: saved[r] for r in range(common)}
        numbers = [number for of_rank in drawn.values() for number in of_rank]
        assert len(set(numbers)) == len(numbers), "two ranks draw alike"
        (message,), *others = (messages for _, messages in results)
        assert message.startswith(said_first)
        assert others == [[]] * (size - 1)


def load_with_another_generator(path: Path, count: int | None) -> tuple[Drawn, list[str]]:
    own = {"noise": np.random.default_rng(1)}
    rng = StatefulRNG(42, ranked=True, logical_ranks=count, generators=own)
    messages = warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner()))
    return by_rank(rng), messages


def test_generators_may_be_added_on_another_number_of_processes(tmp_path: Path) -> None:
    saved = merged(job(4, save, tmp_path / "logical"))
    for size in (2, 4, 8):
        results = job(size, load_with_another_generator, tmp_path / "logical", COUNT)
        assert merged([drawn for drawn, _ in results]) == saved
        assert results[0][1][0].startswith("RNG state: the checkpoint has no noise")
    saved = merged(job(4, save, tmp_path / "plain", None))
    results = job(2, load_with_another_generator, tmp_path / "plain", 4)
    assert merged([drawn for drawn, _ in results]) == saved


def on_mesh(path: Path, shape: tuple[int, int], is_first: bool) -> Drawn:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    with nothing_warned():
        rng = begin(4, mesh=mesh["dp"])
        if is_first:
            dcp.save({"rng": rng}, checkpoint_id=path)
        else:
            dcp.load({"rng": rng}, checkpoint_id=path)
        rng.verify_shared()
    assert len(rng.fingerprint(gather=True)) == 4
    return by_rank(rng)


def test_ranks_along_a_mesh_are_shared_by_its_other_dimension(tmp_path: Path) -> None:
    results = job(4, on_mesh, tmp_path, (2, 2), True)
    assert results[::2] == results[1::2]
    saved = merged(results[::2])
    for size, shape in [(2, (1, 2)), (4, (4, 1)), (2, (2, 1))]:
        results = job(size, on_mesh, tmp_path, shape, False)
        assert merged(results[:: shape[1]]) == saved
        assert merged(results[shape[1] - 1 :: shape[1]]) == saved


def find_what_differs() -> tuple[str, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shared = np.random.default_rng(1)
    rng = begin(4, mesh=mesh["dp"], shared_generators={"shuffle": shared})
    texts = []
    if dist.get_rank() == 1:
        with rng.as_rank(1):
            random.random()
    with pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    texts.append(str(caught.value))
    if dist.get_rank() == 0:
        with rng.as_rank(1):
            random.random()
    rng.verify_shared()
    for rank in set(rng.ranks) - {2}:
        with rng.as_rank(rank):
            shared.random()
    with pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    texts.append(str(caught.value))
    return texts[0], texts[1]


def test_verify_shared_names_the_rank() -> None:
    results = job(4, find_what_differs)
    assert len(set(results)) == 1
    peers, everyone = results[0]
    assert peers.startswith("python: ranks 0, 1 share row 1, but rank 1 differs from rank 0. ")
    assert everyone.startswith("shuffle: all ranks share it, but rank 2 differs from rank 0. ")


def register_on_the_first_process_only(path: Path) -> list[str]:
    own = {"noise": np.random.default_rng(1)} if dist.get_rank() == 0 else {}
    rng = begin(4, generators=own)
    before = rng.fingerprint()
    texts = []
    for use in (
        lambda: dcp.save({"rng": rng}, checkpoint_id=path / "dcp"),
        lambda: rng.save(path / "own"),
        rng.verify_shared,
    ):
        with pytest.raises((CheckpointException, RNGStateError)) as caught:
            use()
        texts.append(str(caught.value))
    assert rng.fingerprint() == before
    return texts


def test_a_generator_on_some_processes_only_is_refused(tmp_path: Path) -> None:
    for with_dcp, with_rng, verified in job(2, register_on_the_first_process_only, tmp_path):
        for text in (with_dcp, with_rng):
            # torch 2.9 logs which key it is.
            assert re.search("rng_streams has overlapping chunks|validate global plan", text)
        assert verified.startswith("noise: rank 0 has this generator and rank 1 has not: register")
    assert not list(tmp_path.glob("*/.metadata"))


def load_plainly(path: Path) -> str:
    rng = StatefulRNG(42, ranked=True, logical_ranks=4)
    with pytest.raises(BaseException, match="Size mismatch") as caught:
        dcp.load({"rng": rng}, checkpoint_id=path)
    with ScopedRNG(42 + rng.rank):
        expected = draw()
    assert draw() == expected
    return str(caught.value)


def test_another_number_without_the_planner_is_torchs_own_error(tmp_path: Path) -> None:
    job(2, save, tmp_path)
    assert all("rng.rng_streams" in text for text in job(2, load_plainly, tmp_path))


def load_with_one_more(path: Path, count: int | None) -> Drawn:
    rng = StatefulRNG(
        42, ranked=True, logical_ranks=count, generators={"noise": random.Random(dist.get_rank())}
    )
    messages = warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner()))
    assert all("the checkpoint has no noise" in message for message in messages)
    return by_rank(rng)


@pytest.mark.parametrize(("saved_by", "size", "count"), [(4, 5, None), (2, 3, 6)])
def test_another_number_and_another_generator_at_once(
    saved_by: int, size: int, count: int | None, tmp_path: Path
) -> None:
    """No record's length tells then how many rows a chunk has: rank 1 was given row 3."""
    saved = merged(job(saved_by, save, tmp_path))
    loaded = merged(job(size, load_with_one_more, tmp_path, count))
    assert {rank: loaded[rank] for rank in loaded if rank < COUNT} == {
        rank: saved[rank] for rank in saved if rank in loaded
    }
