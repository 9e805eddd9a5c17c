"""Save in one job and load in another, with and without a process group."""

from pathlib import Path

import pytest

from scripts.demo.launch import Launch
from tests.jobs import fresh_process
from tests.support.launch import python, torchrun
from tests.support.scripts import run_script

SCRIPT = Path(fresh_process.__file__)


@pytest.mark.parametrize("ranks", [0, 2], ids=["no-group", "torchrun-2"])
def test_a_fresh_process_continues(ranks: int, tmp_path: Path) -> None:
    """Saved by forks, which start in no time; loaded by processes that import everything."""
    if ranks:
        torchrun(SCRIPT, ranks, "save", str(tmp_path))
        Launch(SCRIPT, ranks, "load", str(tmp_path), timeout=100).output()
    else:
        run_script(0, SCRIPT, "save", str(tmp_path))
        done = python(SCRIPT, "load", tmp_path)
        assert done.returncode == 0, done.stderr
    continued = sorted(path.name for path in tmp_path.glob("continued-*"))
    assert continued == [f"continued-{rank}" for rank in range(max(1, ranks))]


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(0, 1), (1, 0)])
def test_one_rank_goes_on_without_a_group_and_the_reverse(
    saved_by: int, loaded_by: int, tmp_path: Path
) -> None:
    run_script(saved_by, SCRIPT, "save", str(tmp_path))
    run_script(loaded_by, SCRIPT, "load", str(tmp_path))
    assert (tmp_path / "continued-0").exists()
