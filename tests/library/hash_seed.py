"""Save, load, or import: here, or as each line of stdin says, with a line for an answer."""

import faulthandler
import json
import os
import sys
from contextlib import redirect_stdout

import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.main import main
from tests.support.streams import warned


def answer(phase: str, *paths: object) -> object:
    if phase == "save":
        dcp.save({"rng": StatefulRNG(1)}, checkpoint_id=str(paths[0]))
        return "".join({*"abcdefghij"})
    if phase == "load":
        return [load(str(path)) for path in paths]
    with redirect_stdout(sys.stderr):
        return main(["import", *map(str, paths)])


def load(path: str) -> list[str]:
    return warned(lambda: dcp.load({"rng": StatefulRNG(1)}, checkpoint_id=path))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)
    # As many seeding functions do. Python has read it long before.
    os.environ["PYTHONHASHSEED"] = "5"
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
