"""Recipes, small and on forked ranks, which start in no time.

``recipes.py NAME FOLDER`` is the recipe of which a rank is killed, as a script for torchrun.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.demo import recipes
from scripts.demo.launch import POLL_SECONDS, kill_if
from scripts.demo.recipes import Job, Recipe, Schedule
from tests.support.jobs import JobError, job
from tests.support.launch import torchrun
from tests.support.scripts import agent, execute, run_script

# `make recipes` does more: more steps, and a resume of each on fewer and on more ranks.
SHORT = Schedule(steps=8, save_every=4, resumed_step=4)
_CHANGES: dict[str, dict[str, Any]] = {
    "train_fsdp2": {"options": ("--layers", "1", "--length", "16")},
    # The epoch ends between the resume and the last step.
    "train_ddp": {"options": ("--samples", "96")},
    "train_hsdp_tp": {"job": Job(2, 2, ("--tp", "2")), "options": ("--layers", "1")},
    "train_elastic": {
        "job": Job(2),
        "resumes": recipes.elastic(4, 1),
        "logical_ranks": 4,
        "options": ("--logical-ranks", "4", "--layers", "1", "--length", "16"),
    },
    "train_grpo": {"resumes": {"on 1 rank": Job(1)}},
}
SMALL = {
    recipe.name: replace(recipe, **{"resumes": {}, "schedule": SHORT, **_CHANGES[recipe.name]})
    for recipe in recipes.RECIPES
}


def train_forked(recipe: Recipe, size: Job, out: Path, kill: bool = False) -> None:
    """As ``recipes.train``, which uses torchrun."""
    if kill:
        killed = f"rank {recipe.killed_rank} ended with SIGKILL"
        with agent() as variables, pytest.raises(JobError, match=killed):
            job(size.ranks, train_and_die, recipe, size, out, variables, group=False)
    script, arguments = recipes.command(recipe, size, out)
    run_script(size.ranks, script, *arguments)


def train_under_torchrun(recipe: Recipe, size: Job, out: Path, kill: bool = False) -> None:
    """As ``train_forked``, but torchrun restarts the ranks after the kill."""
    if kill:
        torchrun(Path(__file__), size.ranks, recipe.name, str(out), restarts=1)
    else:
        train_forked(recipe, size, out)


def train_and_die(recipe: Recipe, size: Job, out: Path, variables: dict[str, str]) -> None:
    def now() -> bool:
        return recipes.is_the_moment(recipe, out)

    rank, restarts = os.getpid(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    to_die = (os.environ["RANK"], restarts) == (str(recipe.killed_rank), "0")
    if to_die and os.fork() == 0:
        while os.getppid() == rank and not (now() and kill_if(rank, now)):
            time.sleep(POLL_SECONDS)
        os._exit(0)
    script, arguments = recipes.command(recipe, size, out)
    execute(script, arguments, variables)


if __name__ == "__main__":
    named = SMALL[sys.argv[1]]
    train_and_die(named, named.job, Path(sys.argv[2]), {})
