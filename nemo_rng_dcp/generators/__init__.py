"""The generators of a process, and how each kind of them is read, written and stored."""

from nemo_rng_dcp.generators.adapter import GeneratorAdapter
from nemo_rng_dcp.generators.device import device_in_use, own_device
from nemo_rng_dcp.generators.device_watch import DeviceWatch
from nemo_rng_dcp.generators.generator_set import GeneratorSet, Slot, States
from nemo_rng_dcp.generators.lent import LentGenerators
from nemo_rng_dcp.generators.parked import Parked
from nemo_rng_dcp.generators.registry import can_be_registered, is_reserved, source_of

__all__ = [
    "DeviceWatch",
    "GeneratorAdapter",
    "GeneratorSet",
    "LentGenerators",
    "Parked",
    "Slot",
    "States",
    "can_be_registered",
    "device_in_use",
    "is_reserved",
    "own_device",
    "source_of",
]
