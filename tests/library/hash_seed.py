"""Save, or load and say what was warned of: ``hash_seed.py save|load CHECKPOINT...``."""

import json
import os
import sys

import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from tests.support.streams import warned


def load(path: str) -> list[str]:
    return warned(lambda: dcp.load({"rng": StatefulRNG(1)}, checkpoint_id=path))


if __name__ == "__main__":
    # As many seeding functions do. Python has read it long before.
    os.environ["PYTHONHASHSEED"] = "5"
    phase, *paths = sys.argv[1:]
    if phase == "save":
        dcp.save({"rng": StatefulRNG(1)}, checkpoint_id=paths[0])
    order = "".join({*"abcdefghij"})
    print(json.dumps([order, [load(path) for path in paths]]))
