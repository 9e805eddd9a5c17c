"""Tests with the libraries' real packages: ``make test-libraries``, outside the default run."""

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "libraries: needs the libraries (make test-libraries)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # The default run's environment has few of them.
    return True if config.getoption("markexpr") != "libraries" else None
