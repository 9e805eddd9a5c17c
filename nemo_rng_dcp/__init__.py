"""One random stream per global rank, inside the ``torch.distributed.checkpoint`` checkpoint."""

from nemo_rng_dcp.automodel import RNGState
from nemo_rng_dcp.errors import RNGStateError, RNGStateWarning
from nemo_rng_dcp.planner import RNGLoadPlanner
from nemo_rng_dcp.record import LIBRARY_VERSION as __version__
from nemo_rng_dcp.scoped import ScopedRNG
from nemo_rng_dcp.seeding import derive_seed, init_all_rng, seed_worker
from nemo_rng_dcp.stateful import StatefulRNG

__all__ = [
    "RNGLoadPlanner",
    "RNGState",
    "RNGStateError",
    "RNGStateWarning",
    "ScopedRNG",
    "StatefulRNG",
    "__version__",
    "derive_seed",
    "init_all_rng",
    "seed_worker",
]
