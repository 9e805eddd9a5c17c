"""Keras on ranks: where layers get their seeds, and which of its generators a checkpoint holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

from nemo_rng_dcp import ScopedRNG, StatefulRNG, derive_seed
from tests.libraries.fresh import fresh, moved

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
BACKENDS = ["torch", "tensorflow"]
X = np.ones((4, 8), "float32")


def build() -> Any:
    import keras

    layers = [keras.layers.Dense(4), keras.layers.GaussianNoise(0.5), keras.layers.Dropout(0.5)]
    return keras.Sequential([keras.Input((8,)), *layers])


def weights(model: Any) -> list[float]:
    return [float(number) for weights in model.get_weights() for number in weights.ravel()]


def train(model: Any) -> list[float]:
    import keras

    drawn: list[float] = keras.ops.convert_to_numpy(model(X, training=True)).ravel().tolist()
    return drawn


# Initial weights.


def initial_weights(how: str) -> list[float]:
    import keras

    keras.utils.set_random_seed(3)
    if how == "before":
        model = build()
    StatefulRNG(1, ranked=True)
    if how == "after":
        model = build()
    if how == "scope":
        with ScopedRNG(derive_seed(1, "keras")):
            model = build()
    if how == "ddp":
        model = build()
        DistributedDataParallel(model)
    return weights(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_set_random_seed_before_stateful_rng_makes_no_ranks_alike(backend: str) -> None:
    first, second = fresh(initial_weights, "after", ranks=2, backend=backend)
    assert first != second


@pytest.mark.parametrize("how", ["before", "scope"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_built_in_a_scope_or_before_is_alike_on_all_ranks(how: str, backend: str) -> None:
    first, second = fresh(initial_weights, how, ranks=2, backend=backend)
    assert first == second


def test_ddp_sends_the_weights_of_rank_0() -> None:
    first, second = fresh(initial_weights, "ddp", ranks=2, backend="torch")
    assert first == second


def drawn_after_a_scope() -> list[float]:
    import keras

    StatefulRNG(1, ranked=True)
    with ScopedRNG(derive_seed(1, "keras")):
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5)])
    return train(model)


def test_layers_built_in_a_scope_drop_alike_on_tensorflow_and_by_rank_on_torch() -> None:
    first, second = fresh(drawn_after_a_scope, ranks=2, backend="tensorflow")
    assert first == second
    first, second = fresh(drawn_after_a_scope, ranks=2, backend="torch")
    assert first != second


# What draws from where.


def streams_of_keras() -> dict[str, set[str]]:
    import keras

    layer, noise = keras.layers.Dropout(0.5), keras.layers.GaussianNoise(0.5)
    glorot = keras.initializers.GlorotUniform(seed=derive_seed(1, "kernel", bits=31))
    keras.random.normal((3,))  # makes Keras's global generator
    return {
        "build": moved(build),
        "Dense": moved(lambda: keras.layers.Dense(3)(X)),
        "Dense with a seed": moved(lambda: keras.layers.Dense(3, kernel_initializer=glorot)(X)),
        "Dropout": moved(lambda: layer(X, training=True)),
        "GaussianNoise": moved(lambda: noise(X, training=True)),
        "keras.random": moved(lambda: keras.random.normal((3,))),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_which_streams_keras_moves(backend: str) -> None:
    assert fresh(streams_of_keras, backend=backend) == {
        "build": {"python"},
        "Dense": {"python"},
        "Dense with a seed": set(),
        "Dropout": {"torch"} if backend == "torch" else set(),
        "GaussianNoise": set(),
        "keras.random": set(),
    }


# What a checkpoint holds.


def continues(path: Path, with_model: bool) -> dict[str, bool]:
    """Return what goes on identically after a load, of what Keras draws from its own generators."""
    import keras

    with ScopedRNG(1):
        model = build()
    keras.random.normal((3,))
    rng = StatefulRNG(1)
    state: dict[str, Any] = {"rng": rng}
    if with_model:
        state["model"] = model.state_dict()

    def draw() -> dict[str, Any]:
        layers = train(model)
        unseeded = keras.ops.convert_to_numpy(keras.random.normal((3,))).tolist()
        seed = derive_seed(1, "noise", 4, bits=31)
        seeded = keras.ops.convert_to_numpy(keras.random.normal((3,), seed=seed)).tolist()
        return {"layers": layers, "unseeded": unseeded, "seeded": seeded, "torch": torch.rand(1)}

    dcp.save(state, checkpoint_id=path)
    expected = draw()
    dcp.load(state, checkpoint_id=path)
    drawn = draw()
    return {name: bool(drawn[name] == expected[name]) for name in drawn}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_record_holds_none_of_keras_own_generators(backend: str, tmp_path: Path) -> None:
    found = fresh(continues, tmp_path, False, backend=backend)
    assert found == {"layers": False, "unseeded": False, "seeded": True, "torch": True}


def test_on_torch_the_models_state_holds_those_of_layers(tmp_path: Path) -> None:
    found = fresh(continues, tmp_path, True, backend="torch")
    assert found == {"layers": True, "unseeded": False, "seeded": True, "torch": True}
