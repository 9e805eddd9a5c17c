"""Scripts on forked ranks: as torchrun runs them, without its seconds of importing torch."""

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from tests.support.jobs import job


def run_script(ranks: int, script: Path, *arguments: str) -> None:
    """Run a script on the ranks of a job, in its own folder; 0 ranks: as python does.

    Raises:
        JobError: It failed.
    """
    if ranks == 0:
        job(1, execute, script, arguments, None, group=False)
        return
    with agent() as variables:
        job(ranks, execute, script, arguments, variables, group=False)


@contextmanager
def agent() -> Iterator[dict[str, str]]:
    """Have the store that torchrun's agent has; yield the variables by which ranks find it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def execute(script: Path, arguments: tuple[str, ...], variables: dict[str, str] | None) -> None:
    """Run a script in this process, on this rank or, without variables, on none."""
    if variables is None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    else:
        os.environ.update(variables)
    os.chdir(script.parent)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))  # as Python does
    runpy.run_path(str(script), run_name="__main__")
