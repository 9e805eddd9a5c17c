"""What an accelerator's streams do in jobs of several ranks.

They run where ``test_accelerator.py`` does. Ranks share devices where there are fewer of them.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor as dtensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, RNGStateWarning, ScopedRNG, StatefulRNG
from nemo_rng_dcp.record import KEY
from tests.support.devices import COUNT, MODULE, TYPE
from tests.support.jobs import job, process_groups
from tests.support.launch import torchrun
from tests.support.streams import draw, warned

pytestmark = pytest.mark.skipif(COUNT == 0, reason="needs an accelerator")

COLLECTIVES = {"cuda": "nccl", "xpu": "xccl"}.get(TYPE, "gloo")


def begin(cpu: bool = True) -> int:
    """Join a job; return the rank's device.

    Args:
        cpu: Whether the group has collectives of CPU tensors, too.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = rank % COUNT
    MODULE.set_device(device)
    MODULE.init()  # before a DeviceMesh does, on the device of LOCAL_RANK
    collectives = COLLECTIVES if world_size <= COUNT else "gloo"  # NCCL takes one rank a device
    dist.init_process_group(
        f"{'cpu:gloo,' if cpu else ''}{TYPE}:{collectives}",
        init_method=f"file://{os.environ['JOB_STORE']}",
        rank=rank,
        world_size=world_size,
    )
    return device


def numbers() -> list[float]:
    """Draw from every stream, on the current device too."""
    return [*draw(), *torch.randn(4, device=TYPE).tolist()]


def save(path: Path) -> list[float]:
    begin()
    rng = StatefulRNG(42, ranked=True)
    for _ in range(dist.get_rank()):
        numbers()
    dcp.save({"rng": rng}, checkpoint_id=path)
    return numbers()


def load(path: Path) -> tuple[list[float], list[str]]:
    begin()
    rng = StatefulRNG(42, ranked=True)
    numbers()
    messages = warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner()))
    return numbers(), messages


def test_every_rank_gets_its_own_devices_stream_back(tmp_path: Path) -> None:
    expected = job(2, save, tmp_path, group=False)
    assert expected[0] != expected[1]
    assert job(2, load, tmp_path, group=False) == [(drawn, []) for drawn in expected]


def test_growing_forks_the_new_ranks_device(tmp_path: Path) -> None:
    expected = job(2, save, tmp_path, group=False)
    (first, words), (second, _), (new, _) = job(3, load, tmp_path, group=False)
    assert [first, second] == expected
    assert not set(new) & {*first, *second}
    assert f"python, numpy, torch, {TYPE} forked" in words[0]


def test_shrinking_drops_a_devices_stream(tmp_path: Path) -> None:
    expected = job(2, save, tmp_path, group=False)
    [(first, [words])] = job(1, load, tmp_path, group=False)
    assert first == expected[0]
    assert "row 1 is dropped" in words


def play_logical_ranks(path: Path, is_first: bool) -> dict[int, list[float]]:
    begin()
    rng = StatefulRNG(42, ranked=True, logical_ranks=4)
    for rank in rng.ranks if is_first else ():
        with rng.as_rank(rank):
            [numbers() for _ in range(rank)]
    if is_first:
        dcp.save({"rng": rng}, checkpoint_id=path)
    else:
        assert warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path)) == []
    drawn = {}
    for rank in reversed(rng.ranks):
        with rng.as_rank(rank):
            drawn[rank] = numbers()
    assert warned(rng.state_dict) == []
    rng.verify_shared()
    return drawn


def test_logical_ranks_have_device_streams_of_their_own_on_any_number_of_processes(
    tmp_path: Path,
) -> None:
    first, second = job(2, play_logical_ranks, tmp_path, True, group=False)
    expected = {**first, **second}
    assert len({number for drawn in expected.values() for number in drawn}) == 4 * 10
    for size in (1, 4, 2):
        results = job(size, play_logical_ranks, tmp_path, False, group=False)
        assert {rank: drawn for found in results for rank, drawn in found.items()} == expected


def test_under_torchrun(tmp_path: Path) -> None:
    script = Path(__file__).with_name("accelerator.py")
    torchrun(script, 2, str(tmp_path))
    drawn = [(tmp_path / f"{rank}").read_text().split("\n") for rank in range(2)]
    assert [after for _, after in drawn] == [before for before, _ in drawn]
    assert drawn[0] != drawn[1]


def save_along(path: Path, shape: tuple[int, ...]) -> tuple[str, int, bool, bool]:
    begin()
    names = ("dp", "tp")[: len(shape)]
    mesh = init_device_mesh(TYPE, shape, mesh_dim_names=names)
    groups = process_groups()
    rng = StatefulRNG(42, ranked=True, mesh=mesh)
    table, again = (rng.state_dict()[KEY] for _ in range(2))
    created = process_groups() - groups
    kept = table.device_mesh is again.device_mesh
    dcp.save({"rng": rng}, checkpoint_id=path)
    expected = numbers()
    dcp.load({"rng": rng}, checkpoint_id=path)
    return table.device.type, created, kept, numbers() == expected


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_mesh_of_devices_keeps_records_on_the_cpu(tmp_path: Path, shape: tuple[int]) -> None:
    assert job(2, save_along, tmp_path, shape, group=False) == [("cpu", 0, True, True)] * 2


def drift() -> tuple[list[str], str]:
    begin()
    mesh = init_device_mesh(TYPE, (1, 2), mesh_dim_names=("dp", "tp"))
    rng = StatefulRNG(42, ranked=True, mesh=mesh["dp"])
    numbers()
    rng.verify_shared()
    if dist.get_rank() == 1:
        torch.rand(1, device=TYPE)
    with pytest.raises(RNGStateError) as error:
        rng.verify_shared()
    return list(rng.fingerprint()), str(error.value)


def test_verify_shared_finds_a_drift_on_the_device_alone() -> None:
    for names, message in job(2, drift, group=False):
        assert names[-1] == TYPE
        assert message.startswith(
            f"{TYPE}: ranks 0, 1 share row 0, but rank 1 differs from rank 0."
        )


class Training:
    """A model with dropout on this rank's device, and its streams."""

    def __init__(self, parallel: str) -> None:
        begin()
        torch.manual_seed(1)
        layers = [torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)]
        self.model: torch.nn.Module = torch.nn.Sequential(*layers).to(TYPE)
        if parallel == "ddp":
            self.model = DistributedDataParallel(self.model)
        else:
            fully_shard(self.model, mesh=init_device_mesh(TYPE, (dist.get_world_size(),)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.rng = StatefulRNG(42, ranked=True)

    def losses(self, steps: int) -> list[float]:
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        loss = self.model(torch.randn(4, 8, device=TYPE)).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "rng": self.rng}


def train(parallel: str, path: Path) -> list[float]:
    training = Training(parallel)
    training.losses(2)
    dcp.save(training.state(), checkpoint_id=path)
    return training.losses(3)


def resume(parallel: str, path: Path) -> list[float]:
    training = Training(parallel)
    state = training.state()
    dcp.load(state, checkpoint_id=path)
    training.model.load_state_dict(state["model"])  # type: ignore[arg-type]
    return training.losses(3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_training_with_dropout_continues_exactly(tmp_path: Path, parallel: str) -> None:
    expected = job(2, train, parallel, tmp_path, group=False)
    assert expected[0] != expected[1]
    assert job(2, resume, parallel, tmp_path, group=False) == expected


def in_a_group_of_devices_alone(path: Path) -> tuple[list[bool], list[dict[str, str]], str]:
    begin(cpu=False)
    rng = StatefulRNG(42, ranked=True)
    dcp.save({"rng": rng}, checkpoint_id=path / "job")
    rng.save(path / "alone")
    drawn = [numbers()]
    loads: list[Callable[[], object]] = [
        lambda: dcp.load({"rng": rng}, checkpoint_id=path / "job"),
        lambda: dcp.load({"rng": rng}, checkpoint_id=path / "job", planner=RNGLoadPlanner()),
        lambda: rng.load(path / "alone"),
    ]
    for load in loads:
        load()
        drawn.append(numbers())
    shared = StatefulRNG(1)
    if dist.get_rank() == 1:
        torch.rand(1, device=TYPE)
    with pytest.raises(RNGStateError) as error:
        shared.verify_shared()
    exact = [other == drawn[0] for other in drawn]
    return exact, [rng.fingerprint(), *rng.fingerprint(gather=True)], str(error.value)


def test_a_group_without_collectives_of_the_cpu_does(tmp_path: Path) -> None:
    """As ``init_process_group("nccl")`` makes it."""
    for rank, (exact, digits, message) in enumerate(
        job(2, in_a_group_of_devices_alone, tmp_path, group=False)
    ):
        own, *of_ranks = digits
        assert exact == [True] * 4
        assert own == of_ranks[rank] != of_ranks[1 - rank]
        assert message.startswith(f"{TYPE}: all ranks share it, but rank 1 differs from rank 0.")


# torch's DTensor gives every rank the stream of rank 0 at its first random operation.


def seed_device(seed: int) -> None:
    MODULE.set_rng_state(torch.Generator(TYPE).manual_seed(seed).get_state())


def seed_of_device() -> int:
    generator = torch.Generator(TYPE)
    generator.set_state(MODULE.get_rng_state())
    return generator.initial_seed()


def draw_on_dtensor() -> None:
    mesh = init_device_mesh(TYPE, (dist.get_world_size(),))
    dtensor.rand(1, device_mesh=mesh)


def reseedings(function: Callable[[], object]) -> list[str]:
    """Return what a function is told about streams that other code replaced."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RNGStateWarning)
        function()
    caught = [warning for warning in caught if "DTensor" in str(warning.message)]
    # The line that called state_dict().
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


def first_operation_after_a_load(path: Path) -> tuple[list[int], list[str], list[str], int]:
    begin()
    rng = StatefulRNG(7, ranked=True)
    dcp.load({"rng": rng}, checkpoint_id=path)
    loaded = seed_of_device()
    draw_on_dtensor()
    replaced = seed_of_device()
    messages = [*reseedings(rng.state_dict), *reseedings(rng.state_dict)]
    seed_device(9)
    messages += reseedings(rng.state_dict)
    torch.manual_seed(5)  # the job's own doing
    after_the_jobs_own = reseedings(rng.state_dict)
    rng.rewind()
    return [loaded, replaced], messages, after_the_jobs_own, seed_of_device()


def test_a_stream_that_dtensor_replaced_is_noticed_at_the_next_save(tmp_path: Path) -> None:
    job(3, save, tmp_path, group=False)
    first, second, third = job(3, first_operation_after_a_load, tmp_path, group=False)
    assert first == ([42, 42], [], [], 42)
    assert third == ([44, 42], [], [], 44)  # rank 1 has said it for all
    seeds, messages, after_the_jobs_own, rewound = second
    assert (seeds, len(messages), after_the_jobs_own, rewound) == ([43, 42], 2, [], 43)
    assert f"other code gave {TYPE}:{1 % COUNT} another stream (seed 42, after 43)" in messages[0]
    assert f"other code gave {TYPE}:{1 % COUNT} another stream (seed 9, after 42)" in messages[1]
    assert "with ScopedRNG(seed=None): torch.distributed.tensor.rand(1, device_mesh=" in messages[0]


def remedy(path: Path) -> tuple[list[float], list[str]]:
    begin()
    rng = StatefulRNG(7, ranked=True)
    with ScopedRNG(seed=None):
        draw_on_dtensor()
    assert seed_of_device() == 7 + dist.get_rank()
    dcp.load({"rng": rng}, checkpoint_id=path)
    with ScopedRNG(seed=None):
        draw_on_dtensor()
    return numbers(), reseedings(rng.state_dict)


def test_an_operation_inside_a_scope_keeps_dtensor_from_replacing_streams(tmp_path: Path) -> None:
    expected = job(2, save, tmp_path, group=False)
    assert job(2, remedy, tmp_path, group=False) == [(weights, []) for weights in expected]


def initialised_by_dtensor(path: Path) -> tuple[int, list[list[str]], int, list[list[str]]]:
    begin()
    rng = StatefulRNG(7, ranked=True)
    draw_on_dtensor()  # the initialisation of a model, say
    started = seed_of_device()
    at_saves = [reseedings(rng.state_dict) for _ in range(2)]
    rng = StatefulRNG(7, ranked=True)
    seed_device(5)
    at_load = reseedings(lambda: dcp.load({"rng": rng}, checkpoint_id=path))
    return started, at_saves, seed_of_device(), [at_load, reseedings(rng.state_dict)]


def test_a_stream_replaced_before_a_load_is_right_after_it_and_noticed_without(
    tmp_path: Path,
) -> None:
    """The first state_dict() may be that of dcp.load, so only the second one speaks."""
    job(2, save, tmp_path, group=False)
    first, second = job(2, initialised_by_dtensor, tmp_path, group=False)
    assert first == (7, [[], []], 42, [[], []])
    started, [at_first_save, at_second_save], loaded, after_load = second
    assert (started, loaded, after_load) == (7, 43, [[], []])
    assert (at_first_save, len(at_second_save)) == ([], 1)


def initialised_after_sharding(scope: bool) -> tuple[list[float], int]:
    begin()
    StatefulRNG(7, ranked=True)
    model = torch.nn.Linear(8, 8, device="meta")
    fully_shard(model, mesh=init_device_mesh(TYPE, (dist.get_world_size(),)))
    model.to_empty(device=TYPE)
    with ScopedRNG(42) if scope else nullcontext():
        model.reset_parameters()
    return model.weight.to_local().flatten().tolist(), seed_of_device()  # type: ignore[operator]


def test_fsdp2_weights_initialised_after_sharding_belong_in_a_scope() -> None:
    (shard, first), (other, second) = job(2, initialised_after_sharding, False, group=False)
    assert (first, second) == (7, 7)  # rank 1 has lost its own
    assert shard != other
    (shard, first), (other, second) = job(2, initialised_after_sharding, True, group=False)
    assert (first, second) == (7, 8)
    assert shard != other
