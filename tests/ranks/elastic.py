"""Checks of resuming on another number of ranks or another mesh, for a launch of 8 processes."""

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, StatefulRNG
from ranks.harness import gather
from ranks.worlds import job, run
from streams import draw, unmoved

Numbers = list[float]


def save(path: Path, *, ranked: bool = True) -> list[Numbers]:
    """Begin a job, draw unevenly, save; returns what each rank draws next."""
    rng = StatefulRNG(42, ranked=ranked)
    draw(dist.get_rank() % 3 if ranked else 1)
    dcp.save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path)
    return gather(draw())  # type: ignore[return-value]


def load(path: Path, *, ranked: bool = True, **options: Any) -> list[Numbers]:
    """Begin a job from a checkpoint; returns what each rank draws next."""
    rng = StatefulRNG(1000, ranked=ranked)
    state = {"rng": rng, "weight": torch.zeros(3)}
    dcp.load(state, checkpoint_id=path, planner=RNGLoadPlanner(), **options)
    assert torch.equal(state["weight"], torch.ones(3))  # type: ignore[arg-type]
    return gather(draw())  # type: ignore[return-value]


def assert_distinct(streams: list[Numbers]) -> None:
    numbers = [number for stream in streams for number in stream]
    assert len(set(numbers)) == len(numbers), "ranks share a stream"


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    """The texts of this library's warnings, in their order."""
    return [str(w.message) for w in caught if "rng" in str(w.message)]


def check_fewer_ranks_keep_their_rows(path: Path) -> None:
    saved = job(4, path / "save", lambda: save(path / "checkpoint"))

    def on_two() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load(path / "checkpoint") == saved[:2]  # type: ignore[index]
        expected = ["rng: 4 rows were saved and 2 are loaded: rows 2 to 3 are dropped"]
        assert warned(caught) == (expected if dist.get_rank() == 0 else [])

    job(2, path / "load", on_two)


def check_more_ranks_fork(path: Path) -> None:
    """4 -> 8 -> 4 -> 8, where nothing at all is drawn between the last two."""
    saved = job(4, path / "save", lambda: save(path / "a"))
    first: list[Numbers] = []

    def grow() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first.extend(load(path / "a"))
        expected = "rng: 4 rows were saved and 8 are loaded: rows 4 to 7 are new"
        assert [text[: len(expected)] for text in warned(caught)] == (
            [expected] if dist.get_rank() == 0 else []
        )
        assert_distinct(first)
        if saved is not None:
            assert first[:4] == saved
        assert load(path / "a") == first, "the same resume twice gives the same streams"

    def save_without_a_draw() -> None:
        rng = StatefulRNG(1000, ranked=True)
        dcp.load({"rng": rng}, checkpoint_id=path / "a", planner=RNGLoadPlanner())
        dcp.save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path / "b")

    def shrink_without_a_draw() -> None:
        rng = StatefulRNG(1000, ranked=True)
        dcp.load({"rng": rng}, checkpoint_id=path / "b", planner=RNGLoadPlanner())
        dcp.save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path / "c")
        assert gather(draw()) == saved

    def grow_again() -> None:
        again = load(path / "c")
        assert again[:4] == first[:4]
        assert_distinct([*again[4:], *first])

    job(8, path / "grow", grow)
    job(8, path / "save again", save_without_a_draw)
    job(4, path / "shrink", shrink_without_a_draw)
    job(8, path / "grow again", grow_again)


def check_a_forked_stream_is_saved_and_restored_like_any_other(path: Path) -> None:
    job(2, path / "save", lambda: save(path / "a"))

    def grow() -> None:
        rng = StatefulRNG(1000, ranked=True)
        state = {"rng": rng}
        dcp.load(state, checkpoint_id=path / "a", planner=RNGLoadPlanner())
        first = draw()
        rng.rewind()
        assert draw() == first
        dcp.save(state, checkpoint_id=path / "b")
        expected = draw()
        dcp.load(state, checkpoint_id=path / "b")
        assert draw() == expected

    job(3, path / "grow", grow)


def check_registered_generators_are_continued_and_forked(path: Path) -> None:
    def draw_registered(generators: dict[str, Any]) -> Numbers:
        drawn = [torch.rand(1, generator=generators["noise"]).item()]
        drawn += [generators["shuffle"].random(), generators["philox"].random()]
        return [*drawn, generators["legacy"].random_sample(), generators["mersenne"].random()]

    def create(seed: int) -> tuple[StatefulRNG, dict[str, Any]]:
        own = seed + dist.get_rank()
        generators = {
            "noise": torch.Generator().manual_seed(own),
            "shuffle": np.random.default_rng(own),
            "philox": np.random.Generator(np.random.Philox(own)),
            "legacy": np.random.RandomState(own),
            "mersenne": random.Random(own),
        }
        rng = StatefulRNG(seed, ranked=True, generators=generators)
        return rng, generators

    def save_registered() -> list[Numbers]:
        rng, generators = create(42)
        dcp.save({"rng": rng}, checkpoint_id=path / "a")
        return gather(draw_registered(generators))  # type: ignore[return-value]

    def load_registered() -> list[Numbers]:
        rng, generators = create(1000)
        dcp.load({"rng": rng}, checkpoint_id=path / "a", planner=RNGLoadPlanner())
        return gather(draw_registered(generators))  # type: ignore[return-value]

    saved = job(3, path / "save", save_registered)
    job(2, path / "fewer", lambda: _assert_rows(load_registered(), saved))
    job(3, path / "same", lambda: _assert_rows(load_registered(), saved))
    job(6, path / "more", lambda: _assert_rows(load_registered(), saved))


def check_unranked_streams_are_taken_as_they_are(path: Path) -> None:
    saved = job(2, path / "save", lambda: save(path / "a", ranked=False))

    def grow() -> None:
        found = load(path / "a", ranked=False)
        if saved is not None:
            assert found == [saved[0]] * 4
        # Ranked streams never become shared ones, on whichever side they were ranked.
        assert len({tuple(numbers) for numbers in load(path / "a", ranked=True)}) == 3

    job(4, path / "grow", grow)


def check_no_dist(path: Path) -> None:
    saved = job(4, path / "save", lambda: save(path / "a"))

    def load_alone() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _assert_rows(load(path / "a", no_dist=True), saved)
        assert len(warned(caught)) == (1 if dist.get_rank() == 0 else 0)

    job(2, path / "fewer", load_alone)
    job(6, path / "more", load_alone)


def _assert_rows(found: list[Numbers], saved: list[Numbers] | None) -> None:
    assert_distinct(found)
    if saved is not None:
        common = min(len(found), len(saved))
        assert found[:common] == saved[:common]


def check_after_async_save(path: Path) -> None:
    def save_async() -> list[Numbers]:
        rng = StatefulRNG(42, ranked=True)
        writing = dcp.async_save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path / "a")
        expected = draw()  # while it is being written
        writing.result()
        return gather(expected)  # type: ignore[return-value]

    saved = job(4, path / "save", save_async)
    job(3, path / "fewer", lambda: _assert_rows(load(path / "a"), saved))
    job(6, path / "more", lambda: _assert_rows(load(path / "a"), saved))


def check_hugging_face_storage(path: Path) -> None:
    if not hasattr(dcp, "HuggingFaceStorageWriter"):
        return  # not public before torch 2.7
    writer = dcp.HuggingFaceStorageWriter(str(path / "a"), save_distributed=True)

    def save_as_safetensors() -> list[Numbers]:
        rng = StatefulRNG(42, ranked=True)
        dcp.save({"rng": rng, "weight": torch.ones(3)}, storage_writer=writer)
        return gather(draw())  # type: ignore[return-value]

    def load_safetensors() -> list[Numbers]:
        rng = StatefulRNG(1000, ranked=True)
        reader = dcp.HuggingFaceStorageReader(str(path / "a"))
        state = {"rng": rng, "weight": torch.zeros(3)}
        dcp.load(state, storage_reader=reader, planner=RNGLoadPlanner())
        return gather(draw())  # type: ignore[return-value]

    saved = job(4, path / "save", save_as_safetensors)
    job(2, path / "fewer", lambda: _assert_rows(load_safetensors(), saved))
    job(5, path / "more", lambda: _assert_rows(load_safetensors(), saved))


class App:
    """A Stateful that nests the RNG entry, as trainers do."""

    def __init__(self, rng: StatefulRNG) -> None:
        self.rng = rng
        self.weight = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "rng": self.rng.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rng.load_state_dict(state_dict["rng"])


def check_nested_inside_another_stateful(path: Path) -> None:
    def save_nested() -> list[Numbers]:
        app = App(StatefulRNG(42, ranked=True))
        app.weight += 7
        dcp.save({"app": app}, checkpoint_id=path / "a")
        return gather(draw())  # type: ignore[return-value]

    def load_nested() -> list[Numbers]:
        app = App(StatefulRNG(1000, ranked=True))
        planner = RNGLoadPlanner(keys=("app.rng",))
        dcp.load({"app": app}, checkpoint_id=path / "a", planner=planner)
        assert torch.equal(app.weight, torch.full((3,), 7.0))
        return gather(draw())  # type: ignore[return-value]

    saved = job(4, path / "save", save_nested)
    job(2, path / "fewer", lambda: _assert_rows(load_nested(), saved))
    job(5, path / "more", lambda: _assert_rows(load_nested(), saved))


class Without(StatefulRNG):
    """Saves as if a generator had not been there yet."""

    missing = "numpy"

    def state_dict(self) -> dict[str, torch.Tensor]:
        tables = super().state_dict()
        del tables[self.missing]
        return tables


def check_a_missing_table_is_left_as_it_is(path: Path) -> None:
    def save_without() -> list[Numbers]:
        # A key that the load does not ask for makes the default planner flatten everything anew.
        state = {"rng": Without(42, ranked=True), "unasked": torch.ones(1)}
        dcp.save(state, checkpoint_id=path / "a")
        return gather(draw())  # type: ignore[return-value]

    saved = job(2, path / "save", save_without)

    def load_with() -> None:
        rng = StatefulRNG(1000, ranked=True)
        expected = draw()
        rng = StatefulRNG(1000, ranked=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dcp.load({"rng": rng}, checkpoint_id=path / "a", planner=RNGLoadPlanner())
        about_missing = [text for text in warned(caught) if "has no" in text]
        assert about_missing == (
            ["the checkpoint has no rng.numpy: these streams stay as they are"]
            if dist.get_rank() == 0
            else []
        )
        found = draw()
        python, numpy, torch_numbers = found[0::3], found[1::3], found[2::3]
        assert numpy == expected[1::3]
        if saved is not None:
            own = saved[dist.get_rank()]
            assert (python, torch_numbers) == (own[0::3], own[2::3])
        else:
            assert python != expected[0::3]
            assert torch_numbers != expected[2::3]

    job(2, path / "same", load_with)
    job(4, path / "more", load_with)


def check_a_checkpoint_without_rng_changes_nothing(path: Path) -> None:
    def whole() -> None:
        dcp.save({"weight": torch.ones(3)}, checkpoint_id=path / "a")
        state = {"weight": torch.zeros(3), "rng": StatefulRNG(1000, ranked=True)}
        with warnings.catch_warnings(record=True) as caught, unmoved():
            warnings.simplefilter("always")
            dcp.load(state, checkpoint_id=path / "a", planner=RNGLoadPlanner())
        assert torch.equal(state["weight"], torch.ones(3))  # type: ignore[arg-type]
        assert len(warned(caught)) == (1 if dist.get_rank() == 0 else 0)

    job(2, path / "job", whole)


def failure(state: Mapping[str, Any], path: Path, planner: Any = None) -> str:
    """The text of a load's error; no stream has moved."""
    with unmoved(), pytest.raises(CheckpointException) as caught:
        dcp.load(dict(state), checkpoint_id=path, planner=planner)
    return str(caught.value)


def check_everything_else_stays_strict(path: Path) -> None:
    job(4, path / "save", lambda: save(path / "a"))

    def strict() -> None:
        rng = StatefulRNG(1000, ranked=True)
        planner = RNGLoadPlanner()
        more = {"rng": rng, "weight": torch.zeros(3), "bias": torch.zeros(3)}
        text = failure(more, path / "a", planner)
        assert "Missing key in checkpoint state_dict: bias" in text
        text = failure({"rng": rng, "weight": torch.zeros(4)}, path / "a", planner)
        assert "Size mismatch" in text
        assert "weight" in text
        lenient = RNGLoadPlanner(allow_partial_load=True)
        dcp.load(more, checkpoint_id=path / "a", planner=lenient)
        assert torch.equal(more["weight"], torch.ones(3))  # type: ignore[arg-type]

    job(2, path / "strict", strict)


def check_a_wrong_key_path_is_an_error(path: Path) -> None:
    job(4, path / "save", lambda: save(path / "a"))

    def wrong() -> None:
        state = {"rng": StatefulRNG(1000, ranked=True), "weight": torch.zeros(3)}
        for key in ("rgn", "weight", "rng.python", "r", "app.rng"):
            text = failure(state, path / "a", RNGLoadPlanner(keys=(key,)))
            assert f"no StatefulRNG at '{key}'" in text

    job(2, path / "wrong", wrong)


def check_without_the_planner_the_error_is_that_of_dcp(path: Path) -> None:
    job(4, path / "save", lambda: save(path / "a"))

    def plain() -> None:
        state = {"rng": StatefulRNG(1000, ranked=True)}
        text = failure(state, path / "a")
        assert "Size mismatch between saved torch.Size([4, 13]) and current: " in text
        assert "for rng.origin" in text

    job(2, path / "plain", plain)


def check_bytes_under_an_rng_key_are_refused_unread(path: Path) -> None:
    def hostile() -> None:
        rng = StatefulRNG(1000, ranked=True)
        payload = Payload(str(path / f"ran-{dist.get_rank()}"))
        tables: dict[str, Any] = {**rng.state_dict(), "numpy": payload}
        dcp.save({"rng": tables}, checkpoint_id=path / "a")
        text = failure({"rng": rng}, path / "a", RNGLoadPlanner())
        assert "rng.numpy: the checkpoint holds bytes" in text
        dist.barrier()
        assert not list(path.glob("ran-*"))
        # The control: plain dcp.load does run it.
        with pytest.raises(RNGStateError):
            dcp.load({"rng": rng}, checkpoint_id=path / "a")
        dist.barrier()
        assert list(path.glob("ran-*"))

    job(2, path / "job", hostile)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def check_another_kind_of_tensor_is_refused(path: Path) -> None:
    def wrong() -> None:
        rng = StatefulRNG(1000, ranked=True)
        for name, tensor in {
            "dtype": torch.zeros(2, 628),
            "width": torch.zeros(2, 9, dtype=torch.int64),
            "dimensions": torch.zeros(2, dtype=torch.int64),
        }.items():
            tables = {**rng.state_dict(), "numpy": tensor}
            dcp.save({"rng": tables}, checkpoint_id=path / name)
            text = failure({"rng": rng}, path / name, RNGLoadPlanner())
            assert "rng.numpy: the checkpoint holds torch." in text

    job(2, path / "job", wrong)


def on_mesh(
    shape: tuple[int, ...], names: tuple[str, ...], along: Any, path: Path
) -> list[Numbers]:
    """Save with one stream per coordinate of a submesh; returns what each rank draws next."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    rng = StatefulRNG(42, ranked=True, mesh=mesh[along])
    rng.verify_shared()
    dcp.save({"rng": rng}, checkpoint_id=path)
    tables = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    rows = mesh[along].size()
    for table in tables.values():
        assert isinstance(table, dcp.TensorStorageMetadata)
        assert table.size[0] == len(table.chunks) == rows, "a shared row is stored once"
    return gather(draw())  # type: ignore[return-value]


def resumed_on_mesh(
    shape: tuple[int, ...], names: tuple[str, ...], along: Any, path: Path, planner: Any = None
) -> list[Numbers]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    rng = StatefulRNG(1000, ranked=True, mesh=mesh[along])
    dcp.load({"rng": rng}, checkpoint_id=path, planner=planner)
    rng.verify_shared()
    return gather(draw())  # type: ignore[return-value]


def check_tensor_parallel_peers_share_a_row(path: Path) -> None:
    names, checkpoint = ("dp", "tp"), path / "a"

    def saved() -> tuple[Numbers, Numbers]:
        found = on_mesh((2, 2), names, "dp", checkpoint)
        assert found[0] == found[1]
        assert found[2] == found[3]
        assert_distinct([found[0], found[2]])
        return found[0], found[2]

    rows = job(4, path / "2x2", saved)

    def narrower() -> None:
        assert resumed_on_mesh((2, 1), names, "dp", checkpoint) == list(rows or ())

    def wider() -> None:
        found = resumed_on_mesh((2, 3), names, "dp", checkpoint)
        assert found == [found[0]] * 3 + [found[3]] * 3
        if rows is not None:
            assert (found[0], found[3]) == rows

    def more_rows() -> None:
        found = resumed_on_mesh((3, 2), names, "dp", checkpoint, RNGLoadPlanner())
        assert found[0::2] == found[1::2]
        assert_distinct(found[0::2])
        if rows is not None:
            assert (found[0], found[2]) == rows

    job(2, path / "2x1", narrower)
    job(6, path / "2x3", wider)
    job(6, path / "3x2", more_rows)


def check_a_row_mixed_from_drifted_peers_is_refused(path: Path) -> None:
    """DCP stores a shared row table by table, each from the peer that has least to write."""

    def drift() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        rng = StatefulRNG(42, ranked=True, mesh=mesh["dp"])
        draw(dist.get_rank())
        dcp.save({"rng": rng}, checkpoint_id=path / "a")
        rng = StatefulRNG(1000, ranked=True, mesh=mesh["dp"])
        with unmoved(), pytest.raises(RNGStateError, match=r"^\w+: row \d does not fit"):
            dcp.load({"rng": rng}, checkpoint_id=path / "a")

    job(4, path / "job", drift)


def check_three_dimensions(path: Path) -> None:
    names, checkpoint = ("pp", "dp", "tp"), path / "a"

    def saved() -> None:
        found = on_mesh((2, 2, 2), names, ("pp", "dp"), checkpoint)
        assert found[0::2] == found[1::2], "tp peers share a stream"
        assert_distinct(found[0::2])
        again = resumed_on_mesh((2, 2, 2), names, ("pp", "dp"), checkpoint)
        assert again == found
        # The rows are numbered row-major, so a one-dimensional mesh of 4 has the same ones.
        dp_only = resumed_on_mesh((4, 2), ("dp", "tp"), "dp", checkpoint)
        assert dp_only == found

    job(8, path / "2x2x2", saved)


def check_the_row_is_added_to_the_seed(path: Path) -> None:
    def compare() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        StatefulRNG(42, ranked=True, mesh=mesh["dp"])
        found = draw()
        StatefulRNG(42 + dist.get_rank() // 2)
        assert draw() == found

    job(4, path / "job", compare)


def check_verify_shared_names_the_drifted(path: Path) -> None:
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
        assert text.startswith("torch: ranks 2, 3 share row 1, but their streams differ")
        assert "numpy" not in text
        assert "ranks 0" not in text
        of_ranks = gather(rng.fingerprint())
        assert of_ranks[2] != of_ranks[3]
        assert rng.fingerprint(gather=True) == [of_ranks[0], of_ranks[2]]  # the lowest speaks
        StatefulRNG(42, ranked=True).verify_shared()  # nothing shared, nothing to differ

    job(4, path / "job", drift)


def check_no_process_group_is_created(path: Path) -> None:
    def count() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        before = len(dist.distributed_c10d._world.pg_map)
        for own in (None, mesh["dp"], mesh):
            rng = StatefulRNG(42, ranked=True, mesh=own)
            dcp.save({"rng": rng}, checkpoint_id=path / "a")
            dcp.load({"rng": rng}, checkpoint_id=path / "a", planner=RNGLoadPlanner())
            rng.verify_shared()
        assert len(dist.distributed_c10d._world.pg_map) == before

    job(4, path / "job", count)


if __name__ == "__main__":
    run(dict(globals()))
