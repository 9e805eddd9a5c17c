"""What every test of a framework trains, what it sees of a resumed run, and how that is put.

A job of 2 ranks trains ``BEFORE`` steps, saves, and trains ``AFTER`` more. New processes on 2, 1
and 3 ranks draw otherwise first, load through the framework, and train the same ``AFTER`` steps.
Every rank has dropout, batches of one size, and draws from all three global streams in each step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.main import main
from tests.support.jobs import JobError, job
from tests.support.streams import draw

PAGES = Path(__file__).parents[2] / "docs" / "frameworks"
BEFORE, AFTER, BATCH = 3, 3, 2
RANKS = 2


@dataclass
class Run:
    """What a rank sees of the steps after the checkpoint, one entry a step.

    The samples, by their first number, are of the whole run.
    """

    losses: list[float] = field(default_factory=list)
    draws: list[list[float]] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)

    def note(self, loss: torch.Tensor | float) -> None:
        self.losses.append(float(loss))
        self.draws.append(draw())


@dataclass(frozen=True)
class Plan:
    """What a rank has to do.

    Attributes:
        folder: Where the checkpoint is.
        resume: Whether to load it first; otherwise it is written.
        ours: Whether the page's snippets run; otherwise the framework is left to itself.
        elsewhere: How much is drawn before the load. Who depends on it was not restored.
    """

    folder: Path
    resume: bool
    ours: bool
    elsewhere: int = 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = nn.functional.dropout(self.first(x), 0.3, self.training)
        return nn.functional.dropout(self.second(hidden.relu()), 0.1, self.training)


def net() -> Net:
    """Return the model, alike on all ranks, without moving a stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def data() -> torch.Tensor:
    """Return the samples: enough for every number of ranks, whole epochs of full batches."""
    return torch.linspace(-1, 1, 4 * 48).reshape(48, 4)


def batch(step: int) -> torch.Tensor:
    """Return a rank's batch of a step, for loops without a data loader."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return data()[[(step * RANKS + rank) * BATCH % 48, (step * RANKS + rank) * BATCH % 48 + 1]]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss: torch.Tensor = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def blocks_of(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL)


def run_page(page: str, block: int, names: dict[str, Any]) -> None:
    """Run a Python block of a page; it reads and sets ``names``."""
    exec(compile(blocks_of(page)[block], f"{page}.md, block {block}", "exec"), names)


@dataclass(frozen=True)
class Verdict:
    """How a resume went, in words for the table, and what every rank saw."""

    same: str
    fewer: str
    more: str
    errors: str = ""


def judge(train: Callable[[Plan], Run], folder: Path, ours: bool) -> Verdict:
    """Save on 2 ranks, resume on 2, 1 and 3, and say what became of every rank's streams."""
    expected = job(RANKS, train, Plan(folder, resume=False, ours=ours))
    assert len({str(run.draws) for run in expected}) == RANKS or not ours, "ranks draw alike"
    assert all(len(run.losses) == len(run.draws) == AFTER for run in expected)
    errors = []

    def resumed(size: int, elsewhere: int) -> list[Run] | str:
        try:
            return job(size, train, Plan(folder, True, ours, elsewhere))
        except JobError as error:
            errors.append(str(error))
            raised = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception))\b", str(error), re.MULTILINE)
            return raised[-1] if raised else "fails"

    return Verdict(
        _words(expected, resumed(RANKS, 1), resumed(RANKS, 2)),
        _words(expected, resumed(1, 1), resumed(1, 2)),
        _words(expected, resumed(3, 1), resumed(3, 2)),
        "\n".join(errors),
    )


EXACT = {
    "same": "exact",
    "fewer": "rank 0 continues",
    "more": "ranks 0, 1 continue, rank 2 forks",
}
"""What a page promises."""


def _words(expected: list[Run], found: list[Run] | str, again: list[Run] | str) -> str:
    if isinstance(found, str) or isinstance(again, str):
        return found if isinstance(found, str) else str(again)
    became: dict[str, list[int]] = {}
    for rank, run in enumerate(found):
        others = [other.draws for number, other in enumerate(found) if number != rank]
        if run.draws != again[rank].draws:
            fate = "not restored"
        elif rank < len(expected) and run.draws == expected[rank].draws:
            fate = "continues"
        elif rank < len(expected):
            fate = f"differs ({_streams_that_differ(run, expected[rank])})"
        elif any(numbers in run.draws for other in others for numbers in other):
            fate = "repeats another"
        else:
            fate = "forks"
        became.setdefault(fate, []).append(rank)
    if list(became) == ["continues"] and len(found) == len(expected):
        equal = [run.losses for run in found] == [run.losses for run in expected]
        return "exact" if equal else "draws exact, losses not"
    return ", ".join(_ranks(ranks, fate) for fate, ranks in became.items())


def _streams_that_differ(run: Run, other: Run) -> str:
    """Return the streams of which a rank drew other numbers; ``draw`` goes round the three."""
    pairs = [zip(a, b, strict=True) for a, b in zip(run.draws, other.draws, strict=True)]
    places = {place % 3 for step in pairs for place, (a, b) in enumerate(step) if a != b}
    names = ("Python", "NumPy", "torch")
    return ", ".join(names[place] for place in sorted(places))


def _ranks(ranks: list[int], fate: str) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} {fate}"
    plural = fate.replace("continues", "continue").replace("differs", "differ")
    return f"ranks {', '.join(map(str, ranks))} {plural}"


def assert_import_continues(
    save: Callable[[str], list[float]], folder: Path, checkpoint: str = ""
) -> None:
    """Make sure that ``nemo-rng-dcp import`` makes records of what a framework saved by itself.

    Args:
        save: Saves through the framework and returns what each rank draws after that.
        folder: An empty one.
        checkpoint: The checkpoint in the folder that is saved to.
    """
    expected = job(RANKS, save, str(folder / "theirs"))
    assert expected[0] != expected[1]
    assert main(["import", str(folder / "theirs" / checkpoint), str(folder / "ours")]) == 0
    assert job(RANKS, loaded, str(folder / "ours")) == expected


def loaded(path: str) -> list[float]:
    StatefulRNG(1, ranked=True).load(path)
    return draw()


def distinct(runs: list[Run]) -> tuple[int, int]:
    """Return how many distinct samples the ranks saw, and how many there were to see."""
    samples = [sample for run in runs for sample in run.samples]
    return len(set(samples)), len(samples)
