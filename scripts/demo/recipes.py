"""Kill and resume every recipe, and print what was equal on which rank.

    python -m scripts.demo.recipes

Each recipe is trained uninterrupted; killed and restarted by torchrun; and resumed, from a
checkpoint of the killed run, on other numbers of ranks or another mesh. Everything is compared from
outside, by the files that the recipe leaves. Exits with 1 if anything is not as it has to be.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scripts.demo import runs
from scripts.demo.launch import ROOT, Launch

OUT = Path("runs", "recipes")


class Schedule(NamedTuple):
    """How many steps a recipe trains, when it saves, and from which save it is resumed."""

    steps: int = 20
    save_every: int = 5
    resumed_step: int = 10

    @property
    def killed_steps(self) -> range:
        """After any of these the newest checkpoint is the one to resume from."""
        return range(self.resumed_step, self.resumed_step + self.save_every - 1)


FULL = Schedule()


class Job(NamedTuple):
    """How a recipe is launched; ``tp`` ranks share their streams."""

    ranks: int
    tp: int = 1
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe, how it is launched, and what can be compared.

    Attributes:
        resumes: Other jobs that go on from a checkpoint, by what is different.
        notes: The files with a line for each step, in the order in which a step writes them.
        generators: The streams from which a step draws as often in each of the jobs.
        logical_ranks: How many there are, where a resume on any number of processes is exact. Each
            of the resumes then goes on two steps behind the start of the one before.
        schedule: When it saves and resumes.
        options: The recipe's, in every job.
    """

    name: str
    job: Job
    resumes: dict[str, Job]
    notes: tuple[str, ...] = ("losses",)
    generators: tuple[str, ...] = ("python", "numpy", "torch")
    logical_ranks: int = 0
    schedule: Schedule = FULL
    options: tuple[str, ...] = ()

    @property
    def killed_rank(self) -> int:
        return self.job.ranks - 1


class Finding(NamedTuple):
    """What was compared, what was found on each rank, and what has to be found."""

    recipe: str
    compared: str
    found: list[str]
    expected: list[str]


def elastic(*processes: int) -> dict[str, Job]:
    """Return jobs of which each leaves a checkpoint where the next one goes on."""
    return {f"on {count}": Job(count, options=("--save-every", "2")) for count in processes}


ON_1_AND_3 = {"on 1 rank": Job(1), "on 3 ranks": Job(3)}
RECIPES = (
    Recipe("train_fsdp2", Job(2), ON_1_AND_3),
    Recipe("train_ddp", Job(2), ON_1_AND_3),
    Recipe(
        "train_hsdp_tp",
        Job(4, 2, ("--replicate", "2", "--tp", "2")),
        {
            "tp 1": Job(2, 1, ("--replicate", "2", "--tp", "1")),
            "1 replica": Job(2, 2, ("--replicate", "1", "--tp", "2")),
            "3 replicas": Job(6, 2, ("--replicate", "3", "--tp", "2")),
        },
    ),
    Recipe("train_elastic", Job(4), elastic(2, 1, 8), logical_ranks=8),
    # Fewer ranks make more rollouts each, so they draw more from torch's stream.
    Recipe("train_grpo", Job(2), ON_1_AND_3, ("rollouts", "losses"), ("python", "numpy")),
)


def train(recipe: Recipe, job: Job, out: Path, kill: bool = False) -> None:
    """Train into ``out``; with ``kill``, kill a rank once and let torchrun restart all of them."""
    started = time.monotonic()
    print(f"{recipe.name:<14}  {out.name:<14} ", end="", flush=True)
    script, arguments = command(recipe, job, out)
    launch = Launch(script, job.ranks, *arguments, restarts=int(kill))
    if kill:
        launch.kill(recipe.killed_rank, lambda: is_the_moment(recipe, out))
    (out / "log.txt").write_text(launch.output())
    print(f"{time.monotonic() - started:4.0f} s", flush=True)


def command(recipe: Recipe, job: Job, out: Path) -> tuple[Path, list[str]]:
    """Return the recipe's file and its arguments."""
    steps, save_every, _ = recipe.schedule
    options = {"--out": out, "--steps": steps, "--save-every": save_every, "--keep": steps}
    arguments = [str(word) for option in options.items() for word in option]
    arguments += ["--hash-every", "1"] if recipe.logical_ranks else []
    arguments += [*recipe.options, *job.options]
    return ROOT / "scripts" / "recipes" / f"{recipe.name}.py", arguments


def is_the_moment(recipe: Recipe, out: Path) -> bool:
    """Return whether the rank to kill has noted a step since the checkpoint to resume from."""
    done = [runs.last_step(out, recipe.killed_rank, note) for note in recipe.notes]
    # Of a recipe that notes its rollout before the update: between the two.
    return done[-1] in recipe.schedule.killed_steps and (len(done) == 1 or done[0] == done[-1] + 1)


def compare(recipe: Recipe, out: Path) -> Iterator[Finding]:
    """Train, kill and resume a recipe; yield what is to be seen."""
    whole, killed = out / "uninterrupted", out / "killed"
    steps, save_every, resumed_step = recipe.schedule
    # On logical ranks one process trains the same as several.
    train(recipe, recipe.job._replace(ranks=1) if recipe.logical_ranks else recipe.job, whole)
    train(recipe, recipe.job, killed, kill=True)
    ranks = range(recipe.logical_ranks or recipe.job.ranks)
    for note in recipe.notes:
        found = [runs.equal_or_not(killed, whole, rank, note) for rank in ranks]
        yield Finding(recipe.name, f"killed: {note}", found, ["equal" for _ in ranks])

    if recipe.logical_ranks:
        yield from compare_logical_ranks(recipe, out, whole, killed)
        return
    saved = runs.read_streams(runs.checkpoint(whole, steps), generators=recipe.generators)
    for title, job in recipe.resumes.items():
        resumed = runs.copy_checkpoint(killed, resumed_step, out / title.replace(" ", "-"))
        train(recipe, job, resumed)
        last = runs.checkpoint(resumed, steps)
        rows = runs.fates(runs.read_streams(last, generators=recipe.generators), saved)
        expected = runs.expected_fates(job.ranks // job.tp, len(saved))
        by_rank = [[fate for fate in fates for _ in range(job.tp)] for fates in (rows, expected)]
        yield Finding(recipe.name, f"{title}: streams", *by_rank)
        if "rollouts" in recipe.notes:
            found = rollout_taken_over(whole, recipe.job.ranks, resumed, job.ranks, resumed_step)
            yield Finding(recipe.name, f"{title}: rollout", found, ["equal"] * job.ranks)
            equal = runs.equal_tensors(last, runs.checkpoint(whole, save_every), "app.reference.")
            yield Finding(
                recipe.name, f"{title}: reference", ["equal" if equal else "NOT"], ["equal"]
            )


def compare_logical_ranks(
    recipe: Recipe, out: Path, whole: Path, killed: Path
) -> Iterator[Finding]:
    """Resume on one number of processes after the other; yield whether all bits are equal."""

    def states(run: Path, title: str, since: int = 0) -> Finding:
        found = runs.equal_or_not(run, whole, 0, "states", since)
        return Finding(recipe.name, f"{title}: weights, optimizer", [found], ["equal"])

    yield states(killed, "killed")
    run = killed
    steps, _, since = recipe.schedule
    for title, job in recipe.resumes.items():
        run = runs.copy_checkpoint(run, since, out / title.replace(" ", "-"))
        train(recipe, job, run)
        ranks = range(recipe.logical_ranks)
        found = [runs.equal_or_not(run, whole, rank, since=since) for rank in ranks]
        yield Finding(recipe.name, f"{title}: losses", found, ["equal" for _ in ranks])
        yield states(run, title, since)
        since += 2
    last, expected = (runs.read_streams(runs.checkpoint(path, steps)) for path in (run, whole))
    found = ["equal" if last.get(r, {}) == streams else "NOT" for r, streams in expected.items()]
    yield Finding(recipe.name, "at the end: streams", found, ["equal"] * recipe.logical_ranks)


def with_fsdp2s_own_sums(recipe: Recipe, out: Path) -> Finding:
    """Train on other numbers of processes as before, but for the order of the sums: a control."""
    runs_of = {count: out / f"fsdp2s-own-on-{count}" for count in (recipe.job.ranks, 2)}
    for count, path in runs_of.items():
        train(recipe, Job(count, options=("--reduction", "fsdp2")), path)
    first, second = runs_of.values()
    found = runs.equal_or_not(second, first, 0, "states")
    expected = "a difference" if found == "equal" else found
    return Finding(recipe.name, "FSDP2's own sums: weights", [found], [expected])


def rollout_taken_over(
    whole: Path, ranks: int, resumed: Path, other_ranks: int, step: int
) -> list[str]:
    """Return on which ranks the resumed job trained its part of the rollout in the checkpoint."""

    def numbers(out: Path, rank: int) -> list[str]:
        return dict(runs.read_steps(out, rank, "rollouts"))[step].strip("[]").split(", ")

    saved = [number for rank in range(ranks) for number in numbers(whole, rank)]
    part = len(saved) // other_ranks
    return [
        "equal" if numbers(resumed, rank) == saved[rank * part : (rank + 1) * part] else "DIFFERENT"
        for rank in range(other_ranks)
    ]


def report(findings: list[Finding]) -> bool:
    """Print the table; return whether everything is as it has to be."""
    width = max(len(finding.found) for finding in findings)
    titles = ["recipe", "compared", *(f"rank {rank}" for rank in range(width))]
    rows = [[recipe, compared, *found, *["-"] * width] for recipe, compared, found, _ in findings]
    columns = [[row[column] for row in rows] for column in range(len(titles))]
    print(f"\n{runs.table(titles, columns)}")
    wrong = [finding for finding in findings if finding.found != finding.expected]
    for finding in wrong:
        print(f"\nFAILED: {finding.recipe}, {finding.compared}: expected {finding.expected}")
    return not wrong


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    steps, save_every, resumed_step = FULL
    print(f"{steps} steps, a checkpoint every {save_every}; the last rank is killed after step")
    print(f"{resumed_step} and torchrun restarts all ranks. Other jobs resume from there.\n")
    findings: list[Finding] = []
    for recipe in RECIPES:
        findings += compare(recipe, OUT / recipe.name)
        if recipe.logical_ranks:
            findings.append(with_fsdp2s_own_sums(recipe, OUT / recipe.name))
    return 0 if report(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
