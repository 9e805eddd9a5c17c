"""A rank is killed while it saves, and torchrun restarts the job.

The new attempt must find the complete checkpoint, and no other, and continue from it bit for bit.
For a launch of 2 processes with 1 restart.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from scripts.demo.leaving import leave_group
from scripts.recipes.train_fsdp2 import complete_checkpoints, save_checkpoint
from tests.support.streams import draw

KILLED_RANK = 1


class KilledWriter(dcp.FileSystemWriter):
    """Dies in the middle of a save: the data is written, the metadata is not."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        written = super().write_data(plan, planner)
        if dist.get_rank() == KILLED_RANK:
            written.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    expected = folder / f"expected-{rank}.json"
    rng = StatefulRNG(42 if attempt == 0 else 1000, ranked=True)
    state = {"rng": rng, "weight": torch.full((5,), float(rank))}

    if attempt == 0:
        draw(rank)
        save_checkpoint(folder, 3, state, step=1)
        expected.write_text(json.dumps(draw(2)))
    else:
        (newest,) = complete_checkpoints(folder)
        assert newest.name == "step-00000001"
        dcp.load(state, checkpoint_id=newest, planner=RNGLoadPlanner())
        assert draw(2) == json.loads(expected.read_text())
    (folder / f"attempt-{attempt}-{rank}").touch()
    dist.barrier()
    if attempt == 0:
        dcp.save(state, storage_writer=KilledWriter(folder / "checkpoints" / "step-00000002"))
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
