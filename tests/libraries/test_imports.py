"""A library's first import may move Python's stream: when it happens, and what then helps."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from tests.libraries.fresh import fresh, moved
from tests.support.streams import draw

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def moved_by_import(module: str) -> set[str]:
    return moved(lambda: importlib.import_module(module))


@pytest.mark.parametrize(
    ("module", "backend", "streams"),
    [
        ("rich", "", set()),
        ("rich.console", "", {"python"}),
        ("sklearn", "", set()),
        ("sklearn.ensemble", "", {"python"}),
        ("sklearn.linear_model", "", {"python"}),
        ("xgboost", "", {"python"}),
        ("lightgbm", "", {"python"}),
        ("catboost", "", set()),
        ("keras", "torch", {"python"}),
        ("keras", "tensorflow", {"python"}),
        ("tensorflow", "", {"python"}),
    ],
)
def test_which_imports_move_a_stream(module: str, backend: str, streams: set[str]) -> None:
    assert fresh(moved_by_import, module, backend=backend) == streams


def save(path: Path) -> list[float]:
    """The library is imported before the save."""
    import lightgbm  # noqa: F401

    rng = StatefulRNG(1)
    dcp.save({"rng": rng}, checkpoint_id=path)
    return draw()


def load(path: Path, remedy: str) -> list[float]:
    """The library is imported after the load."""
    rng, model = StatefulRNG(1), torch.nn.Dropout()
    dcp.load({"rng": rng}, checkpoint_id=path)
    if remedy == "rewind_at_first_forward":
        rng.rewind_at_first_forward(model)
    import lightgbm  # noqa: F401

    if remedy == "rewind":
        rng.rewind()
    model(torch.empty(0))
    return draw()


def test_a_rewind_makes_up_for_an_import_after_the_load(tmp_path: Path) -> None:
    expected = fresh(save, tmp_path)
    assert fresh(load, tmp_path, "") != expected
    assert fresh(load, tmp_path, "rewind") == expected
    assert fresh(load, tmp_path, "rewind_at_first_forward") == expected
