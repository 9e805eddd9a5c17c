"""One random stream per global rank, inside the ``torch.distributed.checkpoint`` checkpoint."""

from importlib import import_module
from typing import TYPE_CHECKING

from nemo_rng_dcp.versions import __version__

if TYPE_CHECKING:
    from nemo_rng_dcp.errors import RNGStateError as RNGStateError
    from nemo_rng_dcp.errors import RNGStateWarning as RNGStateWarning
    from nemo_rng_dcp.generators.tracker import tracker_generators as tracker_generators
    from nemo_rng_dcp.loader import ResumableLoader as ResumableLoader
    from nemo_rng_dcp.planner import RNGLoadPlanner as RNGLoadPlanner
    from nemo_rng_dcp.rng_state import RNGState as RNGState
    from nemo_rng_dcp.scoped import ScopedRNG as ScopedRNG
    from nemo_rng_dcp.seeding import derive_seed as derive_seed
    from nemo_rng_dcp.seeding import init_all_rng as init_all_rng
    from nemo_rng_dcp.seeding import seed_worker as seed_worker
    from nemo_rng_dcp.stateful import StatefulRNG as StatefulRNG

# torch takes a second to import, and the command's --help needs none of it.
_MODULES = {
    "RNGLoadPlanner": "planner",
    "RNGState": "rng_state",
    "RNGStateError": "errors",
    "RNGStateWarning": "errors",
    "ResumableLoader": "loader",
    "ScopedRNG": "scoped",
    "StatefulRNG": "stateful",
    "derive_seed": "seeding",
    "init_all_rng": "seeding",
    "seed_worker": "seeding",
    "tracker_generators": "generators.tracker",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for the first time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
