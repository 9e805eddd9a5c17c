"""The generators of a process, and how each kind of them is read, written and stored."""

from nemo_rng_dcp.generators.adapter import GeneratorAdapter
from nemo_rng_dcp.generators.registry import (
    generators_of_process,
    is_reserved,
    registered_generators,
)
from nemo_rng_dcp.generators.torch_random import device_in_use, initial_seed, own_device

__all__ = [
    "GeneratorAdapter",
    "device_in_use",
    "generators_of_process",
    "initial_seed",
    "is_reserved",
    "own_device",
    "registered_generators",
]
