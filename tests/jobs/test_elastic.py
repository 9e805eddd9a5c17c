"""Resuming on another number of ranks or another mesh, on up to 8 real ranks."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, StatefulRNG
from nemo_rng_dcp.record import KEY
from tests.support.jobs import gather, job, process_groups
from tests.support.streams import draw, unmoved, warned

Numbers = list[float]


def save(path: Path, ranked: bool = True) -> Numbers:
    """Begin a job, draw unevenly, save; returns what this rank draws next."""
    rng = StatefulRNG(42, ranked=ranked)
    draw(dist.get_rank() % 3 if ranked else 1)
    dcp.save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path)
    return draw()


def load(path: Path, ranked: bool = True, no_dist: bool = False) -> Numbers:
    """Begin a job from a checkpoint; returns what this rank draws next."""
    rng = StatefulRNG(42, ranked=ranked)
    draw(5)
    state = {"rng": rng, "weight": torch.zeros(3)}
    dcp.load(state, checkpoint_id=path, planner=RNGLoadPlanner(), no_dist=no_dist)
    assert torch.equal(state["weight"], torch.ones(3))  # type: ignore[arg-type]
    return draw()


def load_and_warn(path: Path, no_dist: bool = False) -> tuple[Numbers, list[str]]:
    """As ``load``, with the texts of this library's warnings."""
    drawn: Numbers = []
    messages = warned(lambda: drawn.extend(load(path, no_dist=no_dist)))
    return drawn, messages


def assert_distinct(streams: list[Numbers]) -> None:
    numbers = [number for stream in streams for number in stream]
    assert len(set(numbers)) == len(numbers), "ranks share a stream"


def assert_rows(found: list[Numbers], saved: list[Numbers]) -> None:
    """Rows that were saved continue, and new ones have streams of their own."""
    assert_distinct(found)
    common = min(len(found), len(saved))
    assert found[:common] == saved[:common]


def test_shrinking_keeps_the_rows_of_the_ranks_that_stay(tmp_path: Path) -> None:
    saved = job(4, save, tmp_path)
    expected = ["RNG state: 4 rows were saved and 2 are loaded: rows 2 to 3 are dropped"]
    assert job(2, load_and_warn, tmp_path) == [(saved[0], expected), (saved[1], [])]


def load_and_save(path: Path, new: Path) -> None:
    """Nothing is drawn between the two."""
    rng = StatefulRNG(1000, ranked=True)
    dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
    dcp.save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=new)


def load_save_and_draw(path: Path, new: Path) -> Numbers:
    load_and_save(path, new)
    return draw()


def test_growing_forks_new_rows(tmp_path: Path) -> None:
    """4 -> 8 -> 4 -> 8, where nothing at all is drawn between the last two."""
    a, b, c = (tmp_path / name for name in "abc")
    saved = job(4, save, a)
    results = job(8, load_and_warn, a)
    first = [numbers for numbers, _ in results]
    assert_rows(first, saved)
    (warning,), *others = (messages for _, messages in results)
    assert warning.startswith("RNG state: 4 rows were saved and 8 are loaded: rows 4 to 7 are new")
    assert others == [[]] * 7
    assert job(8, load, a) == first, "the same resume twice gives the same streams"
    job(8, load_and_save, a, b)
    assert job(4, load_save_and_draw, b, c) == saved
    again = job(8, load, c)
    assert again[:4] == first[:4]
    assert_distinct([*again[4:], *first])


def grow_rewind_save_and_load(path: Path, new: Path) -> None:
    rng = StatefulRNG(1000, ranked=True)
    state = {"rng": rng}
    dcp.load(state, checkpoint_id=path, planner=RNGLoadPlanner())
    first = draw()
    rng.rewind()
    assert draw() == first
    dcp.save(state, checkpoint_id=new)
    expected = draw()
    dcp.load(state, checkpoint_id=new)
    assert draw() == expected


def test_a_forked_stream_is_saved_and_restored_like_any_other(tmp_path: Path) -> None:
    job(2, save, tmp_path / "a")
    job(3, grow_rewind_save_and_load, tmp_path / "a", tmp_path / "b")


def with_generators(seed: int) -> tuple[StatefulRNG, dict[str, Any]]:
    own = seed + dist.get_rank()
    generators = {
        "noise": torch.Generator().manual_seed(own),
        "shuffle": np.random.default_rng(own),
        "philox": np.random.Generator(np.random.Philox(own)),
        "legacy": np.random.RandomState(own),
        "mersenne": random.Random(own),
    }
    return StatefulRNG(seed, ranked=True, generators=generators), generators


def draw_registered(generators: dict[str, Any]) -> Numbers:
    drawn = [torch.rand(1, generator=generators["noise"]).item()]
    drawn += [generators["shuffle"].random(), generators["philox"].random()]
    return [*drawn, generators["legacy"].random_sample(), generators["mersenne"].random()]


def save_registered(path: Path) -> Numbers:
    rng, generators = with_generators(42)
    dcp.save({"rng": rng}, checkpoint_id=path)
    return draw_registered(generators)


def load_registered(path: Path) -> Numbers:
    rng, generators = with_generators(1000)
    dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
    return draw_registered(generators)


def test_registered_generators_are_continued_and_forked(tmp_path: Path) -> None:
    saved = job(3, save_registered, tmp_path)
    for size in (2, 3, 6):
        assert_rows(job(size, load_registered, tmp_path), saved)


def save_unranked(path: Path) -> Numbers:
    noise, order = random.Random(dist.get_rank()), random.Random(5)
    rng = StatefulRNG(42, generators={"noise": noise}, shared_generators={"order": order})
    dcp.save({"rng": rng}, checkpoint_id=path)
    return [*draw(), order.random(), noise.random()]


def load_unranked(path: Path, ranked: bool) -> tuple[Numbers, int]:
    noise, order = random.Random(77), random.Random(88)
    generators = {"noise": noise}
    rng = StatefulRNG(1, ranked, generators=generators, shared_generators={"order": order})
    dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
    return [*draw(), order.random(), noise.random()], torch.initial_seed()


@pytest.mark.parametrize("ranked", [False, True])
def test_registered_generators_fork_and_shared_ones_never_do(ranked: bool, tmp_path: Path) -> None:
    saved = job(2, save_unranked, tmp_path)
    loaded = job(4, load_unranked, tmp_path, ranked)
    assert [numbers for numbers, _ in loaded[:2]] == saved
    assert len({numbers[-1] for numbers, _ in loaded}) == 4, "each rank has noise of its own"
    assert {numbers[-2] for numbers, _ in loaded} == {saved[0][-2]}, "the order is everyone's"
    expected = 3 if ranked else 1  # rows 0 and 1 as they were saved, alike
    assert len({tuple(numbers[:-2]) for numbers, _ in loaded}) == expected
    assert len({seed for _, seed in loaded}) == expected, "torch.initial_seed() differs too"


def test_unranked_streams_are_taken_as_they_are(tmp_path: Path) -> None:
    saved = job(2, save, tmp_path, False)
    assert job(4, load, tmp_path, False) == [saved[0]] * 4
    # Ranked streams never become shared ones, on whichever side they were ranked.
    assert len({tuple(numbers) for numbers in job(4, load, tmp_path, True)}) == 3


@pytest.mark.parametrize("size", [2, 6])
def test_a_load_without_collectives_follows_the_same_rules(size: int, tmp_path: Path) -> None:
    saved = job(4, save, tmp_path)
    results = job(size, load_and_warn, tmp_path, True)
    assert_rows([numbers for numbers, _ in results], saved)
    assert [len(messages) for _, messages in results] == [1] + [0] * (size - 1)


def save_async(path: Path) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    writing = dcp.async_save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path)
    expected = draw()  # while it is being written
    writing.result()
    return expected


def test_after_async_save(tmp_path: Path) -> None:
    saved = job(4, save_async, tmp_path)
    for size in (3, 6):
        assert_rows(job(size, load, tmp_path), saved)


def save_as_safetensors(path: Path) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
    dcp.save({"rng": rng, "weight": torch.ones(3)}, storage_writer=writer)
    return draw()


def load_safetensors(path: Path) -> Numbers:
    rng = StatefulRNG(1000, ranked=True)
    reader = dcp.HuggingFaceStorageReader(str(path))
    state = {"rng": rng, "weight": torch.zeros(3)}
    dcp.load(state, storage_reader=reader, planner=RNGLoadPlanner())
    return draw()


def test_hugging_face_storage(tmp_path: Path) -> None:
    saved = job(4, save_as_safetensors, tmp_path)
    for size in (2, 5):
        assert_rows(job(size, load_safetensors, tmp_path), saved)


class App:
    """A Stateful that nests the RNG entry, as trainers do."""

    def __init__(self, rng: StatefulRNG) -> None:
        self.rng = rng
        self.weight = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "rng": self.rng.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rng.load_state_dict(state_dict["rng"])


def save_nested(path: Path) -> Numbers:
    app = App(StatefulRNG(42, ranked=True))
    app.weight += 7
    dcp.save({"app": app}, checkpoint_id=path)
    return draw()


def load_nested(path: Path) -> Numbers:
    app = App(StatefulRNG(1000, ranked=True))
    dcp.load({"app": app}, checkpoint_id=path, planner=RNGLoadPlanner())
    assert torch.equal(app.weight, torch.full((3,), 7.0))
    return draw()


def test_nested_inside_another_stateful(tmp_path: Path) -> None:
    saved = job(4, save_nested, tmp_path)
    for size in (2, 5):
        assert_rows(job(size, load_nested, tmp_path), saved)


def failure(state: Mapping[str, Any], path: Path, planner: Any = None) -> str:
    """The text of a load's error; no stream has moved."""
    with unmoved(), pytest.raises(CheckpointException) as caught:
        dcp.load(dict(state), checkpoint_id=path, planner=planner)
    return str(caught.value)


def load_what_does_not_fit(path: Path) -> None:
    rng = StatefulRNG(1000, ranked=True)
    planner = RNGLoadPlanner()
    more = {"rng": rng, "weight": torch.zeros(3), "bias": torch.zeros(3)}
    text = failure(more, path, planner)
    assert "Missing key in checkpoint state_dict: bias" in text
    text = failure({"rng": rng, "weight": torch.zeros(4)}, path, planner)
    assert "Size mismatch" in text
    assert "weight" in text
    lenient = RNGLoadPlanner(DefaultLoadPlanner(allow_partial_load=True))
    dcp.load(more, checkpoint_id=path, planner=lenient)
    assert torch.equal(more["weight"], torch.ones(3))  # type: ignore[arg-type]


def test_everything_else_stays_strict(tmp_path: Path) -> None:
    job(4, save, tmp_path)
    job(2, load_what_does_not_fit, tmp_path)


def failure_without_the_planner(path: Path) -> str:
    return failure({"rng": StatefulRNG(1000, ranked=True)}, path)


def test_without_the_planner_the_error_is_that_of_dcp(tmp_path: Path) -> None:
    job(4, save, tmp_path)
    for text in job(2, failure_without_the_planner, tmp_path):
        assert "Size mismatch between saved" in text
        assert "for rng.rng_streams" in text


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def load_bytes(path: Path) -> None:
    rng = StatefulRNG(1000, ranked=True)
    payload = Payload(str(path / f"ran-{dist.get_rank()}"))
    dcp.save({"rng": {KEY: payload}}, checkpoint_id=path / "a")
    text = failure({"rng": rng}, path / "a", RNGLoadPlanner())
    assert "rng.rng_streams: the checkpoint holds bytes" in text
    dist.barrier()
    assert not list(path.glob("ran-*"))
    dist.barrier()
    # The control: plain dcp.load does run it.
    with pytest.raises(RNGStateError):
        dcp.load({"rng": rng}, checkpoint_id=path / "a")


def test_bytes_under_an_rng_key_are_refused_unread(tmp_path: Path) -> None:
    job(2, load_bytes, tmp_path)
    assert list(tmp_path.glob("ran-*"))


Shape = tuple[int, ...]
Names = tuple[str, ...]


def save_on_mesh(shape: Shape, names: Names, along: Any, path: Path) -> Numbers:
    """Save with one stream per coordinate of a submesh; returns what this rank draws next."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    rng = StatefulRNG(42, ranked=True, mesh=mesh[along])
    rng.verify_shared()
    dcp.save({"rng": rng}, checkpoint_id=path)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    table = stored["rng.rng_streams"]
    assert isinstance(table, dcp.TensorStorageMetadata)
    assert len(table.chunks) == mesh[along].size(), "a shared row is stored once"
    return draw()


def load_on_mesh(
    shape: Shape, names: Names, along: Any, path: Path, planner: type[RNGLoadPlanner] | None = None
) -> Numbers:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    rng = StatefulRNG(1000, ranked=True, mesh=mesh[along])
    dcp.load({"rng": rng}, checkpoint_id=path, planner=planner and planner())
    rng.verify_shared()
    return draw()


def test_tensor_parallel_peers_share_a_row(tmp_path: Path) -> None:
    names = ("dp", "tp")
    saved = job(4, save_on_mesh, (2, 2), names, "dp", tmp_path)
    rows = [saved[0], saved[2]]
    assert saved == [rows[0]] * 2 + [rows[1]] * 2
    assert_distinct(rows)
    assert job(2, load_on_mesh, (2, 1), names, "dp", tmp_path) == rows
    wider = job(6, load_on_mesh, (2, 3), names, "dp", tmp_path)
    assert wider == [rows[0]] * 3 + [rows[1]] * 3
    more_rows = job(6, load_on_mesh, (3, 2), names, "dp", tmp_path, RNGLoadPlanner)
    assert more_rows[0::2] == more_rows[1::2]
    assert_rows(more_rows[0::2], rows)


def test_three_dimensions(tmp_path: Path) -> None:
    cube = (2, 2, 2), ("pp", "dp", "tp"), ("pp", "dp")
    saved = job(8, save_on_mesh, *cube, tmp_path)
    assert saved[0::2] == saved[1::2], "tp peers share a stream"
    assert_distinct(saved[0::2])
    assert job(8, load_on_mesh, *cube, tmp_path) == saved
    # The rows are numbered row-major, so a one-dimensional mesh of 4 has the same ones.
    assert job(8, load_on_mesh, (4, 2), ("dp", "tp"), "dp", tmp_path) == saved


def seed_in_two_ways() -> tuple[Numbers, Numbers]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    StatefulRNG(42, ranked=True, mesh=mesh["dp"])
    found = draw()
    StatefulRNG(42 + dist.get_rank() // 2)
    return found, draw()


def test_the_row_is_added_to_the_seed() -> None:
    for found, expected in job(4, seed_in_two_ways):
        assert found == expected


def drift() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rng = StatefulRNG(42, ranked=True, mesh=mesh["dp"])
    with unmoved():
        rng.verify_shared()
    if dist.get_rank() == 3:
        torch.rand(1)
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    text = str(caught.value)
    assert text.startswith("torch: ranks 2, 3 share row 1, but rank 3 differs from rank 2")
    assert "numpy" not in text
    assert "ranks 0" not in text
    of_ranks = gather(rng.fingerprint())
    assert of_ranks[2] != of_ranks[3]
    assert rng.fingerprint(gather=True) == [of_ranks[0], of_ranks[2]]  # the lowest speaks
    StatefulRNG(42, ranked=True).verify_shared()  # nothing shared, nothing to differ


def test_verify_shared_names_the_drifted() -> None:
    job(4, drift)


def count_groups(path: Path) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    before = process_groups()
    for own in (None, mesh["dp"], mesh):
        rng = StatefulRNG(42, ranked=True, mesh=own)
        dcp.save({"rng": rng}, checkpoint_id=path)
        dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
        rng.verify_shared()
    return before, process_groups()


def test_no_process_group_is_created(tmp_path: Path) -> None:
    for before, after in job(4, count_groups, tmp_path):
        assert after == before
