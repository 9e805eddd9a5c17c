"""Streams that differ along some dimensions of a mesh and are shared along others."""

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, StatefulRNG
from tests.support.jobs import gather, job
from tests.support.streams import draw, unmoved, warned

Numbers = list[float]


# Peers of one row that have drifted apart.


def save_drifted(path: Path) -> tuple[str, list[dict[str, str]]]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    rng = StatefulRNG(42, ranked=True, mesh=mesh["dp"])
    if dist.get_rank() == 1:
        random.random()
    fingerprints = gather(rng.fingerprint())
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    dcp.save({"rng": rng, "weight": torch.ones(3)}, checkpoint_id=path)
    draw()
    dcp.load({"rng": rng}, checkpoint_id=path)  # in the processes that saved
    rng.verify_shared()
    return str(caught.value), fingerprints


def load_shared(path: Path) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    rng = StatefulRNG(1000, ranked=True, mesh=mesh["dp"])
    dcp.load({"rng": rng}, checkpoint_id=path)
    rng.verify_shared()
    return rng.fingerprint()


def test_drifted_peers_come_back_as_one_and_the_same_peer(tmp_path: Path) -> None:
    [(text, fingerprints), _] = job(2, save_drifted, tmp_path)
    expected = "python: ranks 0, 1 share row 0, but rank 1 differs from rank 0"
    assert text.startswith(expected), "verify_shared() names them before"
    assert fingerprints[0] != fingerprints[1]
    loaded = job(2, load_shared, tmp_path)
    assert loaded[0] == loaded[1]
    assert loaded[0] in fingerprints, "whole: nothing of the other peer is in it"


# As many rows, but of another mesh.


def save_on(path: Path, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    dcp.save({"rng": StatefulRNG(42, ranked=True, mesh=mesh)}, checkpoint_id=path)


def load_on(path: Path, shape: tuple[int, ...], names: tuple[str, ...]) -> list[str]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    rng = StatefulRNG(42, ranked=True, mesh=mesh)
    return warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path))


def test_another_mesh_of_as_many_rows_warns_once(tmp_path: Path) -> None:
    job(4, save_on, tmp_path, (4, 1), ("dp", "pp"))
    assert job(4, load_on, tmp_path, (4, 1), ("dp", "pp")) == [[]] * 4
    first, *others = job(4, load_on, tmp_path, (2, 2), ("dp", "pp"))
    assert len(first) == 1
    assert "saved along dp 4 x pp 1 and are loaded along dp 2 x pp 2" in first[0]
    assert others == [[]] * 3


# A pipeline stage that saves and loads a checkpoint of its own.


def save_stage(path: Path, shape: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
    rng = StatefulRNG(42, ranked=True, mesh=mesh["dp"])
    stage = mesh["pp"].get_local_rank()
    dcp.save({"rng": rng}, checkpoint_id=path / str(stage), process_group=mesh["dp"].get_group())


def load_stage(path: Path, shape: tuple[int, int]) -> list[str]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
    rng = StatefulRNG(42, ranked=True, mesh=mesh["dp"])
    stage = mesh["pp"].get_local_rank()
    return warned(
        lambda: dcp.load(
            {"rng": rng},
            checkpoint_id=path / str(stage),
            planner=RNGLoadPlanner(),
            process_group=mesh["dp"].get_group(),
        )
    )


@pytest.mark.parametrize(("then", "now", "what"), [(2, 3, "is new"), (3, 2, "is dropped")])
def test_every_stage_that_loads_its_own_checkpoint_warns(
    tmp_path: Path, then: int, now: int, what: str
) -> None:
    job(2 * then, save_stage, tmp_path, (2, then))
    warned_by_rank = job(2 * now, load_stage, tmp_path, (2, now))
    expected = f"{then} rows were saved and {now} are loaded: row 2 {what}"
    for rank, messages in enumerate(warned_by_rank):
        assert len(messages) == (1 if rank in (0, now) else 0)
        assert all(expected in text for text in messages)


# Streams along several meshes: one entry for each.


class Tracker:
    """Named states of one generator, as tensor-parallel libraries keep them."""

    def __init__(self, **seeds: int) -> None:
        self.states = {
            name: torch.Generator().manual_seed(seed).get_state() for name, seed in seeds.items()
        }

    def draw(self, name: str) -> float:
        generator = torch.Generator()
        generator.set_state(self.states[name])
        number = torch.rand(1, generator=generator).item()
        self.states[name] = generator.get_state()
        return number


class TrackerAdapter:
    """Some of a tracker's states as one generator."""

    kind = "tracker"

    def __init__(self, tracker: Tracker, *names: str) -> None:
        self.tracker = tracker
        self.names = names

    def get(self) -> list[torch.Tensor]:
        return [self.tracker.states[name] for name in self.names]

    def set(self, state: list[torch.Tensor]) -> None:
        self.tracker.states.update(zip(self.names, state, strict=True))

    def pack(self, state: list[torch.Tensor]) -> bytes:
        return b"".join(value.numpy().tobytes() for value in state)

    def unpack(self, packed: bytes) -> list[torch.Tensor]:
        if len(packed) != 5056 * len(self.names):
            raise ValueError(f"{len(packed)} bytes for {len(self.names)} states of 5,056")
        content = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        return list(content.split(5056))

    def seed(self, value: int) -> None:
        for number, name in enumerate(self.names):
            seed = (value + number) % 2**64
            self.tracker.states[name] = torch.Generator().manual_seed(seed).get_state()


class Job:
    """A tensor-parallel job: one stream per tp rank, one per dp rank, one alike everywhere."""

    def __init__(self, shape: tuple[int, int], seed: int) -> None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        dp, tp = mesh.get_coordinate() or (0, 0)
        self.tracker = Tracker(tp=seed + 10 + tp, dp=seed + 20 + dp, alike=seed + 30)
        self.entries = {
            "rng": StatefulRNG(
                seed,
                ranked=True,
                mesh=mesh["dp"],
                generators={"tracker": TrackerAdapter(self.tracker, "dp")},
            ),
            "rng_tp": StatefulRNG(
                seed,
                mesh=mesh["tp"],
                generators={"tracker": TrackerAdapter(self.tracker, "tp")},
                shared_generators={"alike": TrackerAdapter(self.tracker, "alike")},
                global_generators=False,
            ),
        }

    def draw(self) -> dict[str, float]:
        return {"global": random.random(), **{n: self.tracker.draw(n) for n in self.tracker.states}}


def save_tracker(path: Path, shape: tuple[int, int]) -> dict[str, float]:
    here = Job(shape, 1)
    here.draw()
    for entry in here.entries.values():
        entry.verify_shared()
    dcp.save(dict(here.entries), checkpoint_id=path)
    return here.draw()


def load_tracker(path: Path, shape: tuple[int, int]) -> tuple[dict[str, float], list[str]]:
    here = Job(shape, 1000)
    messages = warned(
        lambda: dcp.load(dict(here.entries), checkpoint_id=path, planner=RNGLoadPlanner())
    )
    for entry in here.entries.values():
        entry.verify_shared()
    return here.draw(), messages


def test_streams_along_several_meshes_resume_on_other_widths(tmp_path: Path) -> None:
    saved = job(4, save_tracker, tmp_path, (2, 2))  # ranks: dp 0 tp 0, dp 0 tp 1, dp 1 tp 0, ...
    assert saved[0]["dp"] == saved[1]["dp"] != saved[2]["dp"]
    assert saved[0]["tp"] == saved[2]["tp"] != saved[1]["tp"]
    assert len({numbers["alike"] for numbers in saved}) == 1
    for shape in ((2, 2), (1, 2), (2, 1), (4, 1), (1, 4), (2, 3), (3, 2)):
        loaded = job(shape[0] * shape[1], load_tracker, tmp_path, shape)
        seen: dict[tuple[str, int], float] = {}
        for rank, (numbers, _) in enumerate(loaded):
            dp, tp = divmod(rank, shape[1])
            for name, row in (("global", dp), ("dp", dp), ("tp", tp)):
                # Equal among the ranks that share a row, and as saved where the row was saved.
                assert seen.setdefault((name, row), numbers[name]) == numbers[name]
                if row < 2:
                    assert numbers[name] == saved[2 * row if name != "tp" else row][name]
            assert numbers["alike"] == saved[0]["alike"], "never forked"
        assert len(set(seen.values())) == len(seen), "a new row has streams of its own"
    messages = [text for _, warned_of in loaded for text in warned_of]
    assert all("row 2 is new" in text for text in messages)


# verify_shared() and generators that are alike on all ranks.


def drift_of_a_shared_generator() -> str:
    order = random.Random(7)
    rng = StatefulRNG(42, ranked=True, shared_generators={"order": order})
    rng.verify_shared()
    if dist.get_rank() == 2:
        order.random()
    with unmoved(), pytest.raises(RNGStateError) as caught:
        rng.verify_shared()
    return str(caught.value)


def test_verify_shared_compares_shared_generators_across_all_ranks() -> None:
    messages = set(job(3, drift_of_a_shared_generator))
    assert len(messages) == 1
    assert messages.pop().startswith("order: all ranks share it, but rank 2 differs from rank 0.")
