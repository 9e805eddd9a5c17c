"""The checkpoint in ``fixtures/layout-1`` loads for ever: two rows, saved by version 0.1.0."""

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from nemo_rng_dcp.__main__ import main
from tests.fixtures import LAYOUT_1
from tests.support.streams import needs_seed_sequences, warned

FINGERPRINTS = json.loads((LAYOUT_1 / "fingerprints.json").read_text())


def job() -> tuple[StatefulRNG, np.random.Generator]:
    """Return one with the generators of the job that saved, and one of these."""
    shuffle = np.random.default_rng()
    generators = {
        "noise": torch.Generator(),
        "shuffle": shuffle,
        "legacy": np.random.RandomState(),
        "choice": random.Random(),
    }
    shared = {"order": np.random.default_rng()}
    return StatefulRNG(1, ranked=True, generators=generators, shared_generators=shared), shuffle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2), (1, 3)])
def test_every_row_is_restored(
    rank: int, world_size: int, fake_group: Callable[[int, int], None]
) -> None:
    if world_size > 1:
        fake_group(rank, world_size)
    rng = job()[0]
    state = {"app": {"rng": rng.state_dict(), "weight": torch.zeros(3)}}
    dcp.load(state, checkpoint_id=LAYOUT_1, planner=RNGLoadPlanner(), no_dist=True)
    rng.load_state_dict(state["app"]["rng"])
    found = rng.fingerprint()
    assert {name: found[name] for name in FINGERPRINTS[rank]} == FINGERPRINTS[rank]


def test_inspect_shows_its_fingerprints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(LAYOUT_1)])
    shown = capsys.readouterr().out
    for fingerprints in FINGERPRINTS:
        for digits in fingerprints.values():
            assert digits[:7] in shown


@needs_seed_sequences
def test_what_generators_spawn_from_is_absent_and_stays() -> None:
    rng, shuffle = job()
    shuffle.spawn(3)
    state = {"app": {"rng": rng.state_dict(), "weight": torch.zeros(3)}}
    with pytest.raises(CheckpointException, match="Size mismatch"):  # by the default planner
        dcp.load(state, checkpoint_id=LAYOUT_1, no_dist=True)
    dcp.load(state, checkpoint_id=LAYOUT_1, planner=RNGLoadPlanner(), no_dist=True)
    [message] = warned(lambda: rng.load_state_dict(state["app"]["rng"]))
    assert "shuffle.seed_seq, order.seed_seq: the stream stays as it is" in message
    assert shuffle.bit_generator.seed_seq.n_children_spawned == 3  # type: ignore[attr-defined]
