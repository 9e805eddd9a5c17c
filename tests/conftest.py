import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Launched scripts import what the tests import.
_PATH = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATH))

# Not a test, and to import it is to have the device: see its README.
collect_ignore = ["devices/simulated_device"]

# These begin first: a long file at the end would keep one process busy and the others idle.
LONGEST = [
    Path(__file__).parent / name
    for name in (
        "project/test_recipes.py",
        "library/test_loader.py",
        "command/test_command.py",
        "devices/test_simulated_device.py",
        "project/test_bench.py",
        "jobs/test_faults.py",
        "command/test_inspect.py",
        "library/test_versions.py",
        "fuzz/test_metadata.py",
        "jobs/test_storage.py",
        "jobs/test_fresh_process.py",
        "jobs/test_loader.py",
        "jobs/test_dataloader.py",
        "command/test_import_safety.py",
        "command/test_import.py",
        "library/test_recompute.py",
        "jobs/test_elastic_training.py",
        "library/test_planner.py",
        "project/test_pages.py",
        "jobs/test_logical_ranks.py",
        "jobs/test_elastic.py",
        "library/test_standalone.py",
        "library/test_seeding.py",
    )
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    from tests.support.workers import fork_workers

    fork_workers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {path: place for place, path in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


# What is imported stays. To look for garbage meanwhile took a quarter of the time.
gc.disable()


def pytest_collection_finish() -> None:
    # What forks of this process, a loader's workers, neither copy nor look through.
    gc.freeze()
    gc.enable()


# torch is imported where it is used: the process that hands out the tests needs none.


@pytest.fixture(autouse=True)
def _streams_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another one's streams, process group or RANK."""
    from nemo_rng_dcp import ScopedRNG

    monkeypatch.delenv("RANK", raising=False)
    with ScopedRNG(seed=0):
        yield


@pytest.fixture
def fake_group() -> Iterator[Callable[[int, int], None]]:
    """Make this process one rank of a world whose collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def create(rank: int, world_size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield create
    if dist.is_initialized():
        dist.destroy_process_group()
