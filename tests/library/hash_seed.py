"""Save, or load and say what was warned of: ``hash_seed.py save|load CHECKPOINT...``."""

import json
import os
import sys
import warnings

import torch.distributed.checkpoint as dcp

import nemo_rng_dcp


def load(path: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load({"rng": nemo_rng_dcp.StatefulRNG(1)}, checkpoint_id=path)
    return [str(each.message) for each in caught if each.category is nemo_rng_dcp.RNGStateWarning]


if __name__ == "__main__":
    # As many seeding functions do. Python has read it long before.
    os.environ["PYTHONHASHSEED"] = "5"
    phase, *paths = sys.argv[1:]
    if phase == "save":
        dcp.save({"rng": nemo_rng_dcp.StatefulRNG(1)}, checkpoint_id=paths[0])
    order = "".join({*"abcdefghij"})
    print(json.dumps([order, [load(path) for path in paths]]))
