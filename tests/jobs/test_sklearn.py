"""scikit-learn draws from NumPy's global generator unless told otherwise, and so it continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import KFold, train_test_split

from nemo_rng_dcp import StatefulRNG, derive_seed
from tests.support.streams import draw, states, unmoved

POINTS, LABELS = make_classification(n_samples=120, random_state=0)


def split() -> Any:
    return train_test_split(POINTS)[0]


def folds() -> Any:
    return np.concatenate([test for _, test in KFold(4, shuffle=True).split(POINTS)])


def clusters() -> Any:
    return MiniBatchKMeans(5, n_init=1, batch_size=20).fit(POINTS).cluster_centers_


def forest() -> Any:
    return RandomForestClassifier(5).fit(POINTS, LABELS).predict_proba(POINTS)


def linear() -> Any:
    return SGDClassifier().fit(POINTS, LABELS).coef_


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
        by_seed = [
            train_test_split(POINTS, random_state=derive_seed(1, "split", fold))[0]
            for fold in (0, 0, 1)
        ]
    assert np.array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])
