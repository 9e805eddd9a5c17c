"""The counter-example: RNG state in the checkpoint under the same keys on every rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from nemo_rng_dcp import init_all_rng


class RanklessRNG:
    """What much training code does: correct in one process, wrong in two.

    DCP takes equal keys of several ranks for copies of one value and stores one of them, chosen
    field by field. After a load all ranks draw the same numbers, and no error says so.
    """

    def __init__(self, seed: int, ranked: bool = False) -> None:
        init_all_rng(seed, ranked)

    def state_dict(self) -> dict[str, Any]:
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
