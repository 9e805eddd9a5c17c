"""Launches: torchrun on forks, and Python by itself.

A launch of torchrun as a command imports torch once more for itself and for each rank. Here it runs
in a fork, and its ranks are forks of that, by options of its own. ``python``, and ``Launch`` of
the demo, are for what only a real start shows.
"""

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import run

from tests.support.jobs import job

LIMIT_SECONDS = 100
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def torchrun(script: Path, ranks: int, *arguments: str, restarts: int = 0) -> None:
    """Run a script under torchrun to its end.

    Raises:
        JobError: It failed or took too long; the message holds what was printed.
    """
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    torchrun_with(options, script, *arguments)


def torchrun_with(options: list[str], script: Path, *arguments: str) -> None:
    """Run a script under torchrun with these options, in the script's folder."""
    words = [*options, "--run-path", "--start-method=fork", str(script), *arguments]
    job(1, _agent, words, script.parent, group=False, limit=LIMIT_SECONDS)


def _agent(words: list[str], folder: Path) -> None:
    for name in _OF_RANKS:
        del os.environ[name]
    # As in scripts/demo/launch.py, which has the reason.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.chdir(folder)
    run.main(words)


def python(
    *arguments: object, seconds: float = 100, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, as a process that is no rank.

    Args:
        arguments: Python's: a script, or ``-c`` or ``-m``, and what that takes.
        seconds: How long it may take.
        variables: Of its environment, beside those of this process; ``None``: it has none.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def environment(**variables: str | None) -> dict[str, str]:
    """Return this process's environment, of no rank, and with these variables; see ``python``."""
    changed: dict[str, str | None] = {"RANK": None, "WORLD_SIZE": None, **variables}
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return {**kept, **{name: value for name, value in changed.items() if value is not None}}
