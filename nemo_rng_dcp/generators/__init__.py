"""The generators of a process, and how each kind of them is read, written and stored."""

from nemo_rng_dcp.generators.adapter import GeneratorAdapter
from nemo_rng_dcp.generators.registry import global_generators, is_reserved, registered_generators

__all__ = ["GeneratorAdapter", "global_generators", "is_reserved", "registered_generators"]
