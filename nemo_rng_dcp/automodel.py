"""A drop-in for ``nemo_automodel.components.training.rng``: all of its names, on this library.

The calls are the same, and the states of one are read by the other. ``StatefulRNG`` is the one that
stores its streams through DCP, so its ``state_dict()`` is a table and not an ``RNGState``.
"""

from nemo_rng_dcp.rng_state import RNGState, _get_rng_state, _restore_rng_state
from nemo_rng_dcp.scoped import ScopedRNG
from nemo_rng_dcp.seeding import init_all_rng
from nemo_rng_dcp.stateful import StatefulRNG

__all__ = [
    "RNGState",
    "ScopedRNG",
    "StatefulRNG",
    "_get_rng_state",
    "_restore_rng_state",
    "init_all_rng",
]
