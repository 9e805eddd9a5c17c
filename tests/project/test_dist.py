"""What `make dist` built: the wheel in a clean environment, the sdist and its own tests."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]


def built(pattern: str) -> Path:
    [path] = (ROOT / "dist").glob(pattern)
    return path


def run(folder: Path, *command: str | Path, seconds: float = 300) -> str:
    """Run a command that finds nothing but what is installed; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_wheel_runs_the_first_example_in_a_clean_environment(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(tmp_path, python, "-m", "pip", "install", "--constraint", constraints, built("*.whl"))
    where = run(tmp_path, python, "-c", "import nemo_rng_dcp; print(nemo_rng_dcp.__file__)")
    assert where.startswith(str(tmp_path))
    readme = (ROOT / "README.md").read_text()
    [example] = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (tmp_path / "example.py").write_text(example)
    _, torchrun, *arguments = shlex.split(example.splitlines()[0])
    run(tmp_path, tmp_path / "venv" / "bin" / torchrun, *arguments)
    assert "inspect" in run(tmp_path, tmp_path / "venv" / "bin" / "nemo-rng-dcp", "--help")


def test_the_sdist_holds_and_runs_its_own_tests(tmp_path: Path) -> None:
    with tarfile.open(built("*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    tracked = run(ROOT, "git", "ls-files", "nemo_rng_dcp", "tests", "scripts", "docs").split()
    assert [name for name in tracked if not (folder / name).exists()] == []
    where = run(folder, sys.executable, "-c", "import nemo_rng_dcp; print(nemo_rng_dcp.__file__)")
    assert where.startswith(str(folder))
    run(folder, sys.executable, "-m", "pytest", "--collect-only")  # imports every test
    run(
        folder,
        sys.executable,
        "-m",
        "pytest",
        "tests/library/test_layout_1.py",
        "tests/jobs/test_meshes.py",
    )
