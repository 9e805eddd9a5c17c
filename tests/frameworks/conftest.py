"""Tests with the frameworks' real packages: ``make test-frameworks``, outside the default run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.frameworks.training import EXACT, Plan, Run, Verdict, judge
from tests.support.jobs import preload

preload(
    "accelerate",
    "transformers.trainer",
    "torchtitan.components.checkpointer",
    "lightning_fabric",
    "pytorch_lightning",
    "megatron.core.tensor_parallel.random",
    "nemo_automodel.components.checkpoint.checkpointing",
    "nemo_automodel.recipes.llm.train_ft",
    "olmo_core.train.train_module",
    "torchtune.training",
)

VERDICTS: dict[str, tuple[Verdict, Verdict]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "frameworks: needs the frameworks (make test-frameworks)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # The default run's environment has none of them.
    return True if config.getoption("markexpr") != "frameworks" else None


@pytest.fixture
def assert_adopted(tmp_path: Path) -> Callable[..., Verdict]:
    """Return a check that a page keeps its word; the framework's own resume is shown beside it."""

    def check(name: str, train: Callable[[Plan], Run]) -> Verdict:
        own = judge(train, tmp_path / "own", ours=False)
        ours = judge(train, tmp_path / "ours", ours=True)
        VERDICTS[name] = own, ours
        found = {"same": ours.same, "fewer": ours.fewer, "more": ours.more}
        assert found == EXACT, ours.errors
        return own

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not VERDICTS:
        return
    write = terminalreporter.write_line
    write("\n| | resume | 2 -> 2 | 2 -> 1 | 2 -> 3 |\n|---|---|---|---|---|")
    for name, (own, ours) in VERDICTS.items():
        write(f"| {name} | its own | {own.same} | {own.fewer} | {own.more} |")
        write(f"| | with StatefulRNG | {ours.same} | {ours.fewer} | {ours.more} |")
