"""The end of a rank's work."""

from __future__ import annotations

import time

import torch.distributed as dist

SECONDS = 0.5


def leave_group() -> None:
    """Destroy the default process group and let gloo's threads come to an end.

    A thread of gloo's that still lets go of a Python object while the interpreter shuts down aborts
    the process: "terminate called without an active exception", seen with torch 2.13 on a busy
    machine, without this library too (compare pytorch pull request 179291). torchrun would take
    that for a failed rank.
    """
    dist.destroy_process_group()
    time.sleep(SECONDS)
