"""NeMo Automodel's ``rng`` module and ours: their states, and their unit tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rng_dcp import StatefulRNG, automodel
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks

HERE = Path(__file__).parent


def test_their_states_are_ours_and_ours_are_theirs() -> None:
    from nemo_automodel.components.training import rng as theirs

    state = theirs._get_rng_state()
    expected = draw()
    automodel._restore_rng_state(state)
    assert draw() == expected
    StatefulRNG(1).load_state_dict(state)
    assert draw() == expected

    mine = automodel._get_rng_state()
    expected = draw()
    theirs._restore_rng_state(mine)
    assert draw() == expected
    older = theirs.RNGState(
        mine.random_rng_state, mine.np_rng_state, mine.torch_rng_state, mine.cuda_rng_state
    )
    StatefulRNG(1).load_state_dict(older)
    assert draw() == expected


def test_their_unit_tests_pass_on_ours(tmp_path: Path) -> None:
    """Neither wheel nor sdist of theirs holds them: AUTOMODEL_REPO names a clone of their code."""
    if "AUTOMODEL_REPO" not in os.environ:
        pytest.skip("needs AUTOMODEL_REPO, a git clone of NVIDIA-NeMo/Automodel")
    show = ["git", "-C", os.environ["AUTOMODEL_REPO"], "show"]
    show.append("HEAD:tests/unit_tests/training/test_rng.py")
    code = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    (tmp_path / "test_theirs.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "in_place", "-rs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[2]}"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed", done.stdout)
    # All of them but the one that needs a GPU.
    assert found is not None
    assert int(found[1]) == code.count("\ndef test_") - done.stdout.count("CUDA not available")
