"""``make setup`` makes whole environments, each for its folder; ``make lint`` is the hook too."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what ``make setup`` reads."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_a_setup_that_fails_leaves_no_environment(checkout: Path) -> None:
    failing = "PYTHON=mkdir .venv && touch .venv/made && false"
    assert make(checkout, "setup", failing).returncode != 0
    assert not (checkout / ".venv").exists()


def test_a_moved_checkout_sets_up_anew(checkout: Path) -> None:
    """Its environment would run the code of the folder that it was made in."""
    steps = make(checkout, "--dry-run", "setup").stdout
    assert "-m venv .venv" in steps
    [stamp] = {word.strip(";") for word in steps.split() if word.startswith(".venv/ready-")}
    (checkout / ".venv").mkdir()
    (checkout / stamp).touch()
    assert "venv" not in make(checkout, "--dry-run", "setup").stdout
    moved = checkout.rename(checkout.with_name("moved"))
    assert "-m venv .venv" in make(moved, "--dry-run", "setup").stdout


def test_lint_and_the_hook_before_a_commit_are_one_and_the_same() -> None:
    hooks = re.findall(
        r"^ *entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE
    )
    assert hooks == ["make lint"]
    recipe = re.search(
        r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert recipe is not None
    tools = re.findall(r"python -m (\w+)", recipe[1])
    assert set(tools) == {"ruff", "mypy"}
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(re.search(rf"^{tool}==", pinned, re.MULTILINE) for tool in tools)
