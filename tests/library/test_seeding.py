import random
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rng_dcp import ScopedRNG, StatefulRNG, init_all_rng
from tests.support.streams import draw, unmoved


def test_the_seed_reaches_every_stream_as_its_own_library_would_seed_it() -> None:
    init_all_rng(1234)
    found = [random.random(), float(np.random.random()), torch.rand(1).item()]
    generator = torch.Generator().manual_seed(1234)
    assert found == [
        random.Random(1234).random(),
        float(np.random.RandomState(1234).random_sample()),
        torch.rand(1, generator=generator).item(),
    ]


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(5), np.uint8(5)])
def test_seeds_in_range(seed: int) -> None:
    init_all_rng(seed)
    first = draw()
    init_all_rng(int(seed))
    assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1.0, "1", None, True, np.True_, [1]])
@pytest.mark.parametrize("use", [init_all_rng, StatefulRNG, ScopedRNG])
def test_other_seeds_are_refused_by_name(seed: Any, use: Any) -> None:
    if use is ScopedRNG and seed is None:
        return  # None is its way to keep the streams
    with unmoved(), pytest.raises(ValueError, match=r"seed is .*2\*\*32 - 1") as caught:
        use(seed)
    assert repr(seed) in str(caught.value)


def test_seed_and_rank_must_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    init_all_rng(2**32 - 4, ranked=True)
    StatefulRNG(2**32 - 4, ranked=True)
    for use in (init_all_rng, StatefulRNG):
        with unmoved(), pytest.raises(ValueError, match="4294967293 and the rank or row adds 3"):
            use(2**32 - 3, ranked=True)
    scope = ScopedRNG(2**32 - 3, ranked=True)
    with unmoved(), pytest.raises(ValueError, match="adds 3"), scope:
        pass


@pytest.mark.parametrize("use", [init_all_rng, StatefulRNG, ScopedRNG])
@pytest.mark.parametrize("ranked", [1, 0, None, "yes"])
def test_ranked_is_a_bool(ranked: Any, use: Any) -> None:
    with unmoved(), pytest.raises(TypeError, match="ranked is"):
        use(1, ranked=ranked)


def test_ranked_adds_the_rank_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    init_all_rng(10, ranked=True)
    ranked = draw()
    init_all_rng(15)
    assert draw() == ranked


def test_the_group_outranks_the_variable(monkeypatch: pytest.MonkeyPatch, fake_group: Any) -> None:
    monkeypatch.setenv("RANK", "5")
    fake_group(2, 4)
    init_all_rng(10, ranked=True)
    ranked = draw()
    init_all_rng(12)
    assert draw() == ranked


@pytest.mark.parametrize("value", ["", "-1", "two", "1.0"])
def test_a_malformed_rank_variable_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", value)
    with unmoved(), pytest.raises(ValueError, match="RANK is"):
        init_all_rng(1, ranked=True)
