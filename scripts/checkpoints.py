"""A folder of DCP checkpoints in which everything that can be seen is complete."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp


class CheckpointFolder:
    """The newest checkpoints of a run, one sub-folder per step.

    A checkpoint is written under a name that :meth:`newest` does not see and renamed when DCP has
    finished on every rank, so a job killed while saving leaves the previous checkpoint in charge.

    Args:
        path: The folder, shared by all ranks.
        keep: How many checkpoints to keep, >= 1.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if re.fullmatch(r"step-\d{8}", p.name))

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, if there is one."""
        return max(self.complete(), default=None)

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write, publish, prune. Every rank must call it; it communicates."""
        published = self.path / f"step-{step:08d}"
        unpublished = self.path / f"{published.name}.incomplete"
        if dist.get_rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob("*.incomplete"):
                shutil.rmtree(leftover)
        dist.barrier()
        dcp.save(state, checkpoint_id=unpublished)
        if dist.get_rank() == 0:
            unpublished.rename(published)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        # Nobody trains on, and perhaps dies, before the checkpoint is there to resume from.
        dist.barrier()
