"""Ranks under torchrun, a device each where there are enough: draws after a save and its load."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from scripts.demo.leaving import leave_group


def main(folder: Path) -> None:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    device = int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(device)
    dist.init_process_group("gloo")
    rng = StatefulRNG(42, ranked=True)
    dcp.save({"rng": rng}, checkpoint_id=folder / "checkpoint")
    drawn = [str(torch.randn(4, device=accelerator.type).tolist())]
    rng = StatefulRNG(7, ranked=True)
    dcp.load({"rng": rng}, checkpoint_id=folder / "checkpoint")
    drawn += [str(torch.randn(4, device=accelerator.type).tolist())]
    (folder / str(dist.get_rank())).write_text("\n".join(drawn))
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
