"""Run a script on several ranks under torchrun, and kill ranks of it from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 20
POLL_SECONDS = 0.001


class LaunchError(RuntimeError):
    """A launch failed or took too long; the message ends with what it printed."""


class Launch:
    """A script that runs under torchrun on this machine.

    Args:
        script: A Python file.
        processes: Number of ranks, >= 1.
        arguments: The script's arguments.
        restarts: How often torchrun may restart all ranks after one has died.
        timeout: Seconds from now until the launch is ended.
    """

    def __init__(
        self,
        script: Path,
        processes: int,
        *arguments: str,
        restarts: int = 0,
        timeout: float = 120,
    ) -> None:
        self.name = f"{script.name} on {processes} ranks"
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout
        # A file, because nobody reads a pipe while this process waits for the moment of a kill.
        self.printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path),
            # Restarted ranks that share the launcher's store can read the addresses that the killed
            # ones left there, and gloo then fails to connect (pytorch issue 135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", str(script)]
        self.process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=self.printed, stderr=subprocess.STDOUT
        )

    def kill(self, rank: int, when: Callable[[], bool]) -> None:
        """Send SIGKILL to a rank at a moment when ``when()`` is true.

        Raises:
            LaunchError: The launch ended, or its time did, before there was such a moment.
        """
        while self.process.poll() is None and time.monotonic() < self.deadline:
            if when() and (pid := self._pid(rank)) is not None and kill_if(pid, when):
                return
            time.sleep(POLL_SECONDS)
        self._end()
        raise LaunchError(f"{self.name}: no moment to kill rank {rank}:\n{self._output()}")

    def output(self) -> str:
        """Wait for the end; return stdout and stderr of all ranks together.

        Raises:
            LaunchError: The launch ended with an error or ran into the time limit.
        """
        try:
            code = self.process.wait(max(0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._end()
            text = f"{self.name} took over {self.timeout:.0f} s:\n{self._output()}"
            raise LaunchError(text) from None
        output = self._output()
        if code != 0:
            raise LaunchError(f"{self.name} ended with {code}:\n{output}")
        return output

    def _pid(self, rank: int) -> int | None:
        """Return the process of a rank: the child of torchrun that has this RANK."""
        for children in Path("/proc", str(self.process.pid), "task").glob("*/children"):
            for pid in children.read_text().split():
                if f"RANK={rank}".encode() in Path("/proc", pid, "environ").read_bytes().split(
                    b"\0"
                ):
                    return int(pid)
        return None

    def _end(self) -> None:
        # Ranks run in sessions of their own, so only torchrun can end them: SIGTERM asks it to.
        self.process.terminate()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _output(self) -> str:
        with self.printed:
            self.printed.seek(0)
            return self.printed.read()


def kill_if(pid: int, when: Callable[[], bool]) -> bool:
    """Send SIGKILL to a process if ``when()`` is true; return whether it was.

    The process is stopped before the look, so it cannot get past that moment.
    """
    os.kill(pid, signal.SIGSTOP)
    reached = when()
    os.kill(pid, signal.SIGKILL if reached else signal.SIGCONT)
    return reached
