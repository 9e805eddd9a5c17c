"""Show what a kill does to the random streams, and a resume on fewer processes to the losses.

    python -m scripts.demo

Trains the elastic recipe on 4 processes: uninterrupted; killed and resumed with ``StatefulRNG`` in
the checkpoint; killed and resumed with RNG state under the same keys on every rank. Then it resumes
a checkpoint of the second run on 2 processes, and one of these on 1. Compares the losses of every
logical rank with the uninterrupted run's, bit for bit, and all weights and optimizer states at the
end. Exits with 1 if anything is not as it has to be.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from scripts.demo import runs
from scripts.demo.launch import ROOT, Launch

RANKS = 4  # logical ones, and processes of the first runs
STEPS = 40
SAVE_EVERY = 10
KILLED_RANK = 2
KILLED_STEPS = range(24, 28)  # any of these; the newest checkpoint is then that of step 20
RESUMED_STEP = 20
FEWER = {2: 20, 1: 30}
"""On how many processes the run goes on, and from which step."""

RECIPE = ROOT / "scripts" / "recipes" / "train_elastic.py"
RANKLESS = Path(__file__).with_name("rankless.py")

OUT = Path("runs", "demo")
UNINTERRUPTED = OUT / "uninterrupted"
PER_RANK = OUT / "killed-per-rank"
RANK_LESS = OUT / "killed-rank-less"


def resumed_on(processes: int) -> Path:
    return OUT / f"resumed-on-{processes}"


def train(out: Path, script: Path = RECIPE, processes: int = RANKS, kill: bool = False) -> None:
    """Train into ``out``; with ``kill``, kill a rank once and let torchrun restart all of them."""
    started = time.monotonic()
    print(f"{out.name:<20} ", end="", flush=True)
    options = {
        "--out": out,
        "--logical-ranks": RANKS,
        "--steps": STEPS,
        "--save-every": SAVE_EVERY,
        "--keep": STEPS,
    }
    arguments = [str(word) for option in options.items() for word in option]
    launch = Launch(script, processes, *arguments, restarts=int(kill))
    if kill:
        launch.kill(KILLED_RANK, lambda: runs.last_step(out, KILLED_RANK) in KILLED_STEPS)
    (out / "log.txt").write_text(launch.output())
    print(f"{time.monotonic() - started:4.0f} s", flush=True)


def report(out: Path) -> bool:
    """Print the table; return whether every run but the rank-less one is the uninterrupted one."""
    print("\nLosses after the resume against the uninterrupted run, bit for bit:\n")
    whole, ranks = out / UNINTERRUPTED.name, range(RANKS)
    columns = {"logical rank": [f"{rank:>12}" for rank in ranks]}
    resumes = {f"on {RANKS} again": (PER_RANK, 0)}
    resumes |= {f"on {count}": (resumed_on(count), step) for count, step in FEWER.items()}
    for title, (run, step) in {**resumes, "rank-less dict": (RANK_LESS, 0)}.items():
        columns[title] = [
            runs.equal_or_not(out / run.name, whole, rank, since=step) for rank in ranks
        ]
    print(runs.table(list(columns), list(columns.values()), width=10))
    return {equal for title in resumes for equal in columns[title]} == {"equal"}


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    print(
        f"{RANKS} processes, {STEPS} steps, a checkpoint every {SAVE_EVERY}; rank {KILLED_RANK} is"
    )
    print(f"killed after step {RESUMED_STEP} and torchrun restarts all ranks.\n")
    train(UNINTERRUPTED)
    train(PER_RANK, kill=True)
    train(RANK_LESS, RANKLESS, kill=True)
    run = PER_RANK
    for processes, step in FEWER.items():
        run = runs.copy_checkpoint(run, step, resumed_on(processes))
        train(run, processes=processes)

    equal_losses = report(OUT)
    equal_weights = runs.equal_tensors(
        runs.checkpoint(run, STEPS), runs.checkpoint(UNINTERRUPTED, STEPS), "app."
    )
    print("\nWeights and optimizer states after the last step:", end=" ")
    print("equal" if equal_weights else "DIFFERENT")
    if not equal_losses:
        print("\nFAILED: a resumed run with per-rank streams is not the uninterrupted one.")
    return 0 if equal_losses and equal_weights else 1


if __name__ == "__main__":
    sys.exit(main())
