"""Save in one job and load in another: ``fresh_process.py save|load FOLDER``.

Under torchrun as many ranks as it starts, otherwise one process without a process group.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from scripts.demo.leaving import leave_group
from tests.support.streams import draw


def main(phase: str, folder: Path) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", "0"))
    expected = folder / f"expected-{rank}.json"
    # Another seed on loading: nothing may depend on how the new process began.
    rng = StatefulRNG(1 if phase == "save" else 1000, ranked=True)
    state = {"rng": rng, "weight": torch.zeros(3)}
    if phase == "save":
        draw(rank)
        dcp.save(state, checkpoint_id=folder / "checkpoint")
        expected.write_text(json.dumps(draw(3)))
    else:
        dcp.load(state, checkpoint_id=folder / "checkpoint")
        assert draw(3) == json.loads(expected.read_text())
        (folder / f"continued-{rank}").touch()
    if dist.is_initialized():
        leave_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
