"""Save in one job and load in another, with and without a process group."""

from pathlib import Path

import pytest

from conftest import launch
from ranks import fresh_process


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [(2, 2), (0, 0), (0, 1), (1, 0)],
    ids=lambda processes: f"torchrun-{processes}" if processes else "no-group",
)
def test_a_fresh_process_continues(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    script = Path(fresh_process.__file__)
    saved = launch(script, saved_by, "save", str(tmp_path))
    loaded = launch(script, loaded_by, "load", str(tmp_path))
    continued = sorted(path.name for path in tmp_path.glob("continued-*"))
    expected = [f"continued-{rank}" for rank in range(max(1, loaded_by))]
    assert continued == expected, saved + loaded
