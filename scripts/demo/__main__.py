"""Show what a kill does to the random streams, with and without one state per rank.

    python -m scripts.demo

Trains the FSDP2 recipe on 4 ranks three times: uninterrupted; killed and resumed with
``StatefulRNG`` in the checkpoint; killed and resumed with RNG state under the same keys on every
rank. Then compares every rank's losses with the uninterrupted run's, bit for bit, and resumes on
other numbers of ranks. Exits with 1 if anything is not as it has to be.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from scripts.demo import runs
from scripts.demo.launch import ROOT, Launch

RANKS = 4
STEPS = 40
SAVE_EVERY = 10
KILLED_RANK = 2
KILLED_STEPS = range(24, 28)  # any of these; the newest checkpoint is then that of step 20
RESUMED_STEP = 20
OTHER_RANKS = (2, 6)
RECIPE = ROOT / "scripts" / "recipes" / "train_fsdp2.py"
RANKLESS = Path(__file__).with_name("rankless.py")

OUT = Path("runs", "demo")
UNINTERRUPTED = OUT / "uninterrupted"
PER_RANK = OUT / "killed, per-rank streams"
RANK_LESS = OUT / "killed, rank-less dict"


def train(out: Path, script: Path = RECIPE, ranks: int = RANKS, kill: bool = False) -> Path:
    """Train into ``out``; with ``kill``, kill a rank once and let torchrun restart all of them."""
    started = time.monotonic()
    print(f"{out.name:<28} ", end="", flush=True)
    options = {"--out": out, "--steps": STEPS, "--save-every": SAVE_EVERY, "--keep": STEPS}
    arguments = [str(word) for option in options.items() for word in option]
    launch = Launch(script, ranks, *arguments, restarts=int(kill))
    if kill:
        launch.kill(KILLED_RANK, lambda: runs.last_step(out, KILLED_RANK) in KILLED_STEPS)
    (out / "log.txt").write_text(launch.output())
    print(f"{time.monotonic() - started:4.0f} s", flush=True)
    return out


def report_losses(uninterrupted: Path, per_rank: Path, rank_less: Path) -> bool:
    """Print the table; return whether the run with per-rank streams is the uninterrupted one."""
    print(f"\nLosses of steps 0 to {STEPS - 1} against the uninterrupted run, bit for bit:\n")
    ranks = range(RANKS)
    columns = [
        [runs.equal_or_not(run, uninterrupted, rank) for rank in ranks]
        for run in (per_rank, rank_less)
    ]
    titles = ["rank", "per-rank streams", "rank-less dict"]
    print(runs.table(titles, [[f"{rank:>4}" for rank in ranks], *columns], width=22))
    return set(columns[0]) == {"equal"}


def report_streams(uninterrupted: runs.Streams, others: list[runs.Streams]) -> bool:
    """Print the table; return whether every stream is what the rules say."""
    found = [runs.fates(streams, uninterrupted) for streams in others]
    print(f"\nStreams of the checkpoint of step {RESUMED_STEP}, saved by {RANKS} ranks:\n")
    titles = ["rank", *(f"resumed on {len(streams)} ranks" for streams in others)]
    height = max(map(len, found))
    print(runs.table(titles, [[f"{rank:>4}" for rank in range(height)], *found], width=22))
    return found == [runs.expected_fates(len(streams), RANKS) for streams in others]


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"{RANKS} ranks, {STEPS} steps, a checkpoint every {SAVE_EVERY}; rank {KILLED_RANK} is")
    print(f"killed after step {RESUMED_STEP} and torchrun restarts all ranks.\n")
    train(UNINTERRUPTED)
    train(PER_RANK, kill=True)
    train(RANK_LESS, RANKLESS, kill=True)
    others = []
    for ranks in OTHER_RANKS:
        out = runs.copy_checkpoint(PER_RANK, RESUMED_STEP, OUT / f"resumed on {ranks} ranks")
        train(out, ranks=ranks)
        others.append(runs.read_streams(runs.checkpoint(out, STEPS)))

    equal = report_losses(UNINTERRUPTED, PER_RANK, RANK_LESS)
    as_ruled = report_streams(runs.read_streams(runs.checkpoint(UNINTERRUPTED, STEPS)), others)
    if not equal:
        print("\nFAILED: the resumed run with per-rank streams is not the uninterrupted one.")
    if not as_ruled:
        print("\nFAILED: on another number of ranks, some stream is not what the rules say.")
    return 0 if equal and as_ruled else 1


if __name__ == "__main__":
    sys.exit(main())
