"""``python -m nemo_rng_dcp`` is the command ``nemo-rng-dcp``."""

import gc
import sys

from nemo_rng_dcp.cli.main import main


def run() -> None:
    """Be the process of the command; exits with its code."""
    # Of thousands of rows nothing is garbage, and a collection looks at all of them again.
    gc.disable()
    sys.exit(main())


if __name__ == "__main__":
    run()
