"""The counter-example: the elastic recipe with RNG state under the same keys on every rank."""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemo_rng_dcp import init_all_rng
from nemo_rng_dcp.determinism import set_deterministic
from scripts.demo.leaving import leave_group

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # the reduction beside the recipe
import train_elastic as recipe


class RanklessRNG:
    """What much training code does: correct in one process, wrong in two.

    DCP takes equal keys of several ranks for copies of one value and stores one of them, chosen
    field by field. After a load all ranks draw the same numbers, and no error says so.
    """

    def __init__(self, seed: int, ranked: bool = True) -> None:
        init_all_rng(seed, ranked)
        self.rank, self.logical_ranks = dist.get_rank(), dist.get_world_size()
        self.ranks = range(self.rank, self.rank + 1)

    def as_rank(self, rank: int) -> nullcontext[None]:
        return nullcontext()

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


def main() -> None:
    config = recipe.validate_and_prepare_config()
    set_deterministic()
    mesh = recipe.setup_distributed()
    config.out.mkdir(parents=True, exist_ok=True)
    rng: Any = RanklessRNG(config.seed)
    training = recipe.setup_model_and_optimizer(config, mesh, rng)
    recipe.train(config, mesh, training, rng)
    leave_group()


if __name__ == "__main__":
    main()
