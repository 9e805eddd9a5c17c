"""TensorFlow's own generator is in no checkpoint, and determinism is a switch of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG, derive_seed
from nemo_rng_dcp.determinism import set_deterministic
from tests.libraries.fresh import fresh

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def resume(path: Path, reseed: bool) -> tuple[list[float], list[float]]:
    import tensorflow as tf

    rng = StatefulRNG(1)
    tf.random.set_seed(derive_seed(1, "tensorflow", bits=64))

    def epoch() -> list[float]:
        if reseed:
            tf.random.set_seed(derive_seed(1, "tensorflow", 4, bits=64))
        drawn: list[float] = tf.random.normal((3,)).numpy().tolist()
        order = tf.data.Dataset.range(100).shuffle(100).as_numpy_iterator()
        return [*drawn, *map(float, order)]

    dcp.save({"rng": rng}, checkpoint_id=path)
    expected = epoch()
    dcp.load({"rng": rng}, checkpoint_id=path)
    return expected, epoch()


def test_tensorflows_generator_is_not_in_the_checkpoint_and_a_seed_by_epoch_replaces_it(
    tmp_path: Path,
) -> None:
    expected, drawn = fresh(resume, tmp_path, False)
    assert drawn != expected
    expected, drawn = fresh(resume, tmp_path, True)
    assert drawn == expected


def unseeded_draw(op_determinism: bool) -> str:
    import tensorflow as tf

    set_deterministic()
    if op_determinism:
        tf.config.experimental.enable_op_determinism()
    try:
        tf.random.normal((3,))
    except RuntimeError as error:
        return str(error)
    return "drawn"


def test_set_deterministic_does_not_reach_tensorflow() -> None:
    """Its own switch refuses to draw without a seed, which shows whether it is on."""
    found: Any = fresh(unseeded_draw, False)
    assert found == "drawn"
    assert "seed" in fresh(unseeded_draw, True)
