"""One random stream per global rank, inside the ``torch.distributed.checkpoint`` checkpoint."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Now, before a job can set it: Python read it at its start, and a later change has no effect.
_hash_seed = os.environ.get("PYTHONHASHSEED")

if TYPE_CHECKING:
    from nemo_rng_dcp.automodel import RNGState
    from nemo_rng_dcp.errors import RNGStateError, RNGStateWarning
    from nemo_rng_dcp.planner import RNGLoadPlanner
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

# torch takes a second to import, and the command's --help needs none of it.
_MODULES = {
    "RNGLoadPlanner": "planner",
    "RNGState": "automodel",
    "RNGStateError": "errors",
    "RNGStateWarning": "errors",
    "ScopedRNG": "scoped",
    "StatefulRNG": "stateful",
    "derive_seed": "seeding",
    "init_all_rng": "seeding",
    "seed_worker": "seeding",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for the first time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
