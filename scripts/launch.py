"""Run a script on several ranks under torchrun, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

GRACE_SECONDS = 20


class LaunchError(RuntimeError):
    """A launch failed or took too long; the message ends with what it printed."""


def torchrun(
    script: Path, processes: int, *arguments: str, restarts: int = 0, timeout: float = 120
) -> str:
    """Run ``script`` under torchrun on this machine.

    Args:
        script: A Python file.
        processes: Number of ranks, >= 1.
        arguments: The script's arguments.
        restarts: How often torchrun may restart all ranks after one has died.
        timeout: Seconds until the launch is ended.

    Returns:
        stdout and stderr of all ranks together.

    Raises:
        LaunchError: The launch ended with an error or ran into the time limit.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Restarted ranks that share the launcher's store can read the addresses that the killed
        # ones left there, and gloo then fails to connect (pytorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", str(script)]
    process = subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Ranks run in sessions of their own, so only torchrun can end them: SIGTERM asks it to.
        process.terminate()
        try:
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        raise LaunchError(
            f"{script.name} on {processes} ranks took over {timeout:.0f} s:\n{output}"
        ) from None
    if process.returncode != 0:
        raise LaunchError(
            f"{script.name} on {processes} ranks ended with {process.returncode}:\n{output}"
        )
    return output
