"""``python -m nemo_rng_dcp`` is the command ``nemo-rng-dcp``."""

import sys

from nemo_rng_dcp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
