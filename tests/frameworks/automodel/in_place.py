"""A pytest plugin: who imports NeMo Automodel's ``rng`` gets this library's names instead."""

import sys
import types

import nemo_rng_dcp
from nemo_rng_dcp import automodel

ours = types.ModuleType("nemo_automodel.components.training.rng")
for name in ("RNGState", "ScopedRNG", "StatefulRNG", "init_all_rng"):
    setattr(ours, name, getattr(nemo_rng_dcp, name))
ours._get_rng_state = automodel._get_rng_state  # type: ignore[attr-defined]
ours._restore_rng_state = automodel._restore_rng_state  # type: ignore[attr-defined]
sys.modules[ours.__name__] = ours
