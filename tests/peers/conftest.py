"""Tests that other packages ship, on resumed streams: ``make test-peers``, outside the default run.

What is tested is in the packages; here is what stands between them and their generators.
"""

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "peers: runs the tests of others (make test-peers)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # They take minutes.
    return True if config.getoption("markexpr") != "peers" else None
