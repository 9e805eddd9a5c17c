"""scikit-learn draws from NumPy's global generator unless told otherwise, and so it continues."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG, derive_seed
from tests.support.streams import draw, states, unmoved

# scikit-learn takes a second to import, and every process of pytest imports this module.


@cache
def data() -> Any:
    """Return points and their labels."""
    from sklearn.datasets import make_classification

    return make_classification(n_samples=120, random_state=0)


def split(**options: Any) -> Any:
    from sklearn.model_selection import train_test_split

    return train_test_split(data()[0], **options)[0]


def folds() -> Any:
    from sklearn.model_selection import KFold

    return np.concatenate([test for _, test in KFold(4, shuffle=True).split(data()[0])])


def clusters() -> Any:
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(5, n_init=1, batch_size=20).fit(data()[0]).cluster_centers_


def forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(5).fit(*data()).predict_proba(data()[0])


def linear() -> Any:
    from sklearn.linear_model import SGDClassifier

    return SGDClassifier().fit(*data()).coef_


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("use", [split, folds, clusters, forest, linear])
def test_scikit_learn_continues_identically(use: Callable[[], Any], tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    use()
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    before = states()["numpy"]
    expected = use()
    assert states()["numpy"] != before, "it does not draw from NumPy's global generator"
    draw(5)
    assert not np.array_equal(use(), expected)
    dcp.load({"rng": rng}, checkpoint_id=tmp_path)
    assert np.array_equal(use(), expected)


def test_a_derived_random_state_leaves_the_streams_alone() -> None:
    with unmoved():
        by_seed = [split(random_state=derive_seed(1, "split", fold)) for fold in (0, 0, 1)]
    assert np.array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])
