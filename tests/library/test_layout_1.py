"""The checkpoint in ``fixtures/layout-1`` loads for ever: two rows, saved by version 0.1.0."""

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from nemo_rng_dcp.__main__ import main
from tests.fixtures import LAYOUT_1

FINGERPRINTS = json.loads((LAYOUT_1 / "fingerprints.json").read_text())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2), (1, 3)])
def test_every_row_is_restored(
    rank: int, world_size: int, fake_group: Callable[[int, int], None]
) -> None:
    if world_size > 1:
        fake_group(rank, world_size)
    generators = {
        "noise": torch.Generator(),
        "shuffle": np.random.default_rng(),
        "legacy": np.random.RandomState(),
        "choice": random.Random(),
    }
    shared = {"order": np.random.default_rng()}
    rng = StatefulRNG(1, ranked=True, generators=generators, shared_generators=shared)
    state = {"app": {"rng": rng.state_dict(), "weight": torch.zeros(3)}}
    dcp.load(state, checkpoint_id=LAYOUT_1, planner=RNGLoadPlanner(), no_dist=True)
    rng.load_state_dict(state["app"]["rng"])
    found = rng.fingerprint()
    assert {name: found[name] for name in FINGERPRINTS[rank]} == FINGERPRINTS[rank]


def test_inspect_shows_the_fingerprints_of_layout_1(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(LAYOUT_1)])
    shown = capsys.readouterr().out
    for fingerprints in FINGERPRINTS:
        for digits in fingerprints.values():
            assert digits[:7] in shown
