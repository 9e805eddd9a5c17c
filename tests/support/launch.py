"""Scripts in new processes, as they are started outside tests."""

import os
import subprocess
import sys
from pathlib import Path

from scripts.demo.launch import Launch, LaunchError


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
