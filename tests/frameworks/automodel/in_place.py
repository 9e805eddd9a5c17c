"""A pytest plugin: who imports NeMo Automodel's ``rng`` gets this library's names instead."""

import sys

from nemo_rng_dcp import automodel

sys.modules["nemo_automodel.components.training.rng"] = automodel
