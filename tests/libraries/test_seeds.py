"""What each library that docs/libraries.md names draws from our streams, and from a seed."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nemo_rng_dcp import derive_seed
from tests.libraries.fresh import SEEDS, fresh, moved

pytestmark = pytest.mark.libraries

POINTS = np.linspace(0, 1, 1000).reshape(200, 5) ** 2 % 0.37
LABELS = (np.sin(77 * POINTS.sum(1)) > 0).astype(int)


def scikit_learn(seed: int | None) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(5, random_state=seed).fit(POINTS, LABELS)
    return forest.predict_proba(POINTS)


def xgboost(seed: int | None) -> Any:
    import xgboost

    parameters = {"objective": "binary:logistic", "subsample": 0.5}
    parameters |= {} if seed is None else {"seed": seed}
    data = xgboost.DMatrix(POINTS, label=LABELS)
    return xgboost.train(parameters, data, 5).predict(data)


def lightgbm(seed: int | None) -> Any:
    import lightgbm

    parameters = {"objective": "binary", "bagging_fraction": 0.5, "bagging_freq": 1, "verbose": -1}
    parameters |= {} if seed is None else {"seed": seed, "deterministic": True}
    return lightgbm.train(parameters, lightgbm.Dataset(POINTS, label=LABELS), 5).predict(POINTS)


def catboost(seed: int | None) -> Any:
    from catboost import CatBoostClassifier

    options = {"bootstrap_type": "Bernoulli", "subsample": 0.5, "allow_writing_files": False}
    model = CatBoostClassifier(iterations=5, verbose=0, random_seed=seed, **options)
    return model.fit(POINTS, LABELS).predict_proba(POINTS)


def keras(seed: int | None) -> Any:
    import keras

    layer = keras.layers.GaussianNoise(0.5, seed=seed)
    return keras.ops.convert_to_numpy(layer(np.ones((2, 3), "float32"), training=True))


def tensorflow(seed: int | None) -> Any:
    import tensorflow

    if seed is not None:
        tensorflow.random.set_seed(seed)
    return tensorflow.random.normal((3,)).numpy()


IGNORED, COUNTED, REFUSED = "ignored", "counted", "refused"

# The library, what Keras runs on, the bits of a seed that count, and what becomes of the next bit.
LIBRARIES: list[tuple[Callable[[int | None], Any], str, int, str]] = [
    (scikit_learn, "", 32, REFUSED),
    (xgboost, "", 32, IGNORED),
    (lightgbm, "", 31, IGNORED),
    (catboost, "", 64, REFUSED),
    (keras, "torch", 31, REFUSED),
    (keras, "tensorflow", 63, REFUSED),
    (tensorflow, "", 64, COUNTED),
]


def folds(use: Callable[[int | None], Any], bits: int) -> tuple[list[Any], set[str]]:
    use(0)  # what is imported by the first use may draw
    results: list[Any] = []

    def train() -> None:
        for fold in (0, 0, 1):
            results.append(use(derive_seed(42, use.__name__, fold, bits=bits)))

    streams = moved(train)
    return results, streams


@pytest.mark.parametrize(("use", "backend", "bits", "beyond"), LIBRARIES)
def test_a_derived_seed_tells_folds_apart_and_moves_no_stream(
    use: Callable[[int | None], Any], backend: str, bits: int, beyond: str
) -> None:
    (first, again, other), streams = fresh(folds, use, bits, backend=backend)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert streams == set()


def with_bits(use: Callable[[int | None], Any], bits: int) -> list[Any]:
    """Return what comes of 5, of 5 with its highest bit set, and with the one beyond."""
    results = [use(5), use(5 + 2 ** (bits - 1))]
    with contextlib.suppress(Exception):  # each library's own
        results.append(use(5 + 2**bits))
    return results


@pytest.mark.parametrize(("use", "backend", "bits", "beyond"), LIBRARIES)
def test_as_many_bits_count_as_the_page_says(
    use: Callable[[int | None], Any], backend: str, bits: int, beyond: str
) -> None:
    plain, highest, *wider = fresh(with_bits, use, bits, backend=backend)
    assert not np.array_equal(plain, highest)
    found = REFUSED if not wider else IGNORED if np.array_equal(plain, wider[0]) else COUNTED
    assert found == beyond


def without_a_seed(use: Callable[[int | None], Any]) -> tuple[bool, set[str], set[str]]:
    """Return whether our streams decide, from which it draws, and which it moves."""
    use(0)

    def after(**seeds: int) -> Any:
        for name, seed in SEEDS.items():
            seed(seeds.get(name, 1))
        return use(None)

    expected = after()
    same = np.array_equal(after(), expected)
    drawn = {name for name in SEEDS if not np.array_equal(after(**{name: 2}), expected)}
    return same, drawn, moved(lambda: use(None))


@pytest.mark.parametrize(
    ("use", "backend", "stream"),
    [
        (scikit_learn, "", {"numpy"}),
        (xgboost, "", set()),
        (lightgbm, "", set()),
        (catboost, "", set()),
        (keras, "torch", {"python"}),
        (keras, "tensorflow", {"python"}),
    ],
)
def test_without_a_seed_it_draws_from_one_of_our_streams_or_uses_a_constant(
    use: Callable[[int | None], Any], backend: str, stream: set[str]
) -> None:
    assert fresh(without_a_seed, use, backend=backend) == (True, stream, stream)


def test_tensorflow_has_a_generator_of_its_own() -> None:
    same, _, moves = fresh(without_a_seed, tensorflow)
    assert not same, "none of our streams decides what it draws"
    assert moves == set()
