"""One random stream per global rank, inside the ``torch.distributed.checkpoint`` checkpoint."""

from nemo_rng_dcp.derive import derive_seed, seed_worker
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.planner import RNGLoadPlanner
from nemo_rng_dcp.scoped import ScopedRNG
from nemo_rng_dcp.seeding import init_all_rng
from nemo_rng_dcp.snapshot import RNGState
from nemo_rng_dcp.stateful import StatefulRNG
from nemo_rng_dcp.version import __version__

__all__ = [
    "RNGLoadPlanner",
    "RNGState",
    "RNGStateError",
    "ScopedRNG",
    "StatefulRNG",
    "__version__",
    "derive_seed",
    "init_all_rng",
    "seed_worker",
]
