"""One random stream per global rank, inside the ``torch.distributed.checkpoint`` checkpoint."""

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.planner import RNGLoadPlanner
from nemo_rng_dcp.scoped import ScopedRNG
from nemo_rng_dcp.seeding import init_all_rng
from nemo_rng_dcp.snapshot import RNGState
from nemo_rng_dcp.stateful import StatefulRNG

__all__ = [
    "RNGLoadPlanner",
    "RNGState",
    "RNGStateError",
    "ScopedRNG",
    "StatefulRNG",
    "init_all_rng",
]

__version__ = "0.1.0"
