"""``xgboost.cv`` reseeds NumPy's global generator, and what keeps ranks apart all the same."""

from contextlib import nullcontext

import numpy as np
import pytest

from nemo_rng_dcp import ScopedRNG, StatefulRNG, derive_seed
from tests.libraries.fresh import fresh
from tests.libraries.test_seeds import LABELS, POINTS

pytestmark = pytest.mark.libraries


def cross_validate(scoped: bool, options: dict[str, int]) -> tuple[list[float], list[float]]:
    """Return what this rank draws without and after a cross-validation."""
    import xgboost

    data = xgboost.DMatrix(POINTS, label=LABELS)
    StatefulRNG(1, ranked=True)
    without = np.random.random(3).tolist()
    StatefulRNG(1, ranked=True)
    with ScopedRNG(derive_seed(1, "cv")) if scoped else nullcontext():
        xgboost.cv({"objective": "binary:logistic"}, data, 2, nfold=3, **options)
    return without, np.random.random(3).tolist()


@pytest.mark.parametrize("options", [{}, {"seed": derive_seed(1, "cv", bits=31)}])
def test_after_a_cross_validation_ranks_draw_the_same(options: dict[str, int]) -> None:
    (expected, drawn), (others_expected, others) = fresh(cross_validate, False, options, ranks=2)
    assert expected != others_expected
    assert drawn == others != expected


def test_a_scope_around_it_keeps_the_ranks_streams() -> None:
    (expected, drawn), (others_expected, others) = fresh(cross_validate, True, {}, ranks=2)
    assert (drawn, others) == (expected, others_expected)
    assert drawn != others
