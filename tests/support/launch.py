"""New processes: a script under torchrun, and Python by itself.

``jobs.py`` has the ranks that start in no time; these are for what only a real start shows.
"""

import os
import subprocess
import sys
from pathlib import Path

from scripts.demo.launch import Launch


def torchrun(script: Path, ranks: int, *arguments: str, restarts: int = 0) -> str:
    """Run a script under torchrun to its end; return what all ranks printed.

    Raises:
        LaunchError: It failed or took too long; the message holds what was printed.
    """
    return Launch(script, ranks, *arguments, restarts=restarts, timeout=100).output()


def python(
    *arguments: object, seconds: float = 100, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, as a process that is no rank.

    Args:
        arguments: Python's: a script, or ``-c`` or ``-m``, and what that takes.
        seconds: How long it may take.
        variables: Of its environment, beside those of this process; ``None``: it has none.
    """
    changed: dict[str, str | None] = {"RANK": None, "WORLD_SIZE": None, **variables}
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**kept, **{name: value for name, value in changed.items() if value is not None}},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
