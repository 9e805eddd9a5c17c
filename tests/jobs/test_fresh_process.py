"""Save in one job and load in another, with and without a process group."""

from pathlib import Path

import pytest

from scripts.demo.launch import Launch
from tests.jobs import fresh_process
from tests.support.launch import torchrun
from tests.support.scripts import run_script

SCRIPT = Path(fresh_process.__file__)


def test_fresh_processes_continue(tmp_path: Path) -> None:
    """Saved by forks, which start in no time; loaded by processes that import everything."""
    torchrun(SCRIPT, 2, "save", str(tmp_path))
    Launch(SCRIPT, 2, "load", str(tmp_path), timeout=100).output()
    continued = sorted(path.name for path in tmp_path.glob("continued-*"))
    assert continued == ["continued-0", "continued-1"]


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(0, 0), (0, 1), (1, 0)])
def test_one_rank_goes_on_with_or_without_a_group(
    saved_by: int, loaded_by: int, tmp_path: Path
) -> None:
    run_script(saved_by, SCRIPT, "save", str(tmp_path))
    run_script(loaded_by, SCRIPT, "load", str(tmp_path))
    assert (tmp_path / "continued-0").exists()
