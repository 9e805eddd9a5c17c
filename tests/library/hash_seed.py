"""Save, load, or import, as each line of stdin says; answer with a line."""

import faulthandler
import json
import os
import sys
from contextlib import redirect_stdout

import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.main import main
from tests.support.streams import warned


def load(path: str) -> list[str]:
    return warned(lambda: dcp.load({"rng": StatefulRNG(1)}, checkpoint_id=path))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)
    # As many seeding functions do. Python has read it long before.
    os.environ["PYTHONHASHSEED"] = "5"
    for line in sys.stdin:
        phase, *paths = json.loads(line)
        if phase == "save":
            dcp.save({"rng": StatefulRNG(1)}, checkpoint_id=paths[0])
            answer: object = "".join({*"abcdefghij"})
        elif phase == "load":
            answer = [load(path) for path in paths]
        else:
            with redirect_stdout(sys.stderr):
                answer = main(["import", *paths])
        print(json.dumps(answer), flush=True)
