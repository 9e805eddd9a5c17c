import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rng_dcp import ScopedRNG
from scripts.demo.launch import Launch, LaunchError

# Launched scripts import what the tests import.
TESTS = Path(__file__).parent
_FOLDERS = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _FOLDERS))

# Not a test, and to import it is to have the device: see its README.
collect_ignore = ["simulated_device"]


@pytest.fixture(autouse=True)
def _streams_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another one's streams, process group or RANK."""
    monkeypatch.delenv("RANK", raising=False)
    with ScopedRNG(seed=0):
        yield


@pytest.fixture
def fake_group() -> Iterator[Callable[[int, int], None]]:
    """Make this process one rank of a world whose collectives do nothing."""

    def create(rank: int, world_size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield create
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(script: Path, processes: int, *arguments: str) -> str:
    """Run a script and return its output, whether it failed or not; 0 processes: no torchrun."""
    if processes == 0:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=environment, check=False
        )
        return done.stdout + done.stderr
    try:
        return Launch(script, processes, *arguments, timeout=100).output()
    except LaunchError as error:
        return str(error)
