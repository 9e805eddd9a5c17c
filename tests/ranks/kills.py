"""A rank is killed while it saves, while it saves in the background, and while it loads.

torchrun restarts all ranks after each kill; every new attempt must find the complete checkpoint,
and no other, and continue from it bit for bit. For a launch of 2 processes with 3 restarts.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from scripts.demo.leaving import leave_group
from scripts.recipes.train_fsdp2 import complete_checkpoints, save_checkpoint
from streams import draw

KILLED_RANK = 1


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


real_write_data = dcp.FileSystemWriter.write_data


def killed_write_data(self: dcp.FileSystemWriter, plan: SavePlan, planner: SavePlanner) -> Any:
    """Die in the middle of any save: the data is written, the metadata is not."""
    written = real_write_data(self, plan, planner)
    if dist.get_rank() == KILLED_RANK:
        written.wait()
        die()
    return written


class KilledReader(dcp.FileSystemReader):
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        if dist.get_rank() == KILLED_RANK:
            die()
        return super().read_data(plan, planner)


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

    dcp.FileSystemWriter.write_data = killed_write_data  # type: ignore[method-assign]
    if attempt == 0:
        save_checkpoint(folder, 3, state, step=2)
    elif attempt == 1:
        unpublished = folder / "checkpoints" / "step-00000003"
        dcp.async_save(state, checkpoint_id=unpublished).result()
    elif attempt == 2:
        reader = KilledReader(complete_checkpoints(folder)[-1])
        dcp.load(state, storage_reader=reader, planner=RNGLoadPlanner())
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
