"""Show what a kill does to the random streams, with and without one state per rank.

Trains the recipe on 4 ranks three times: uninterrupted, killed and resumed with ``StatefulRNG`` in
the checkpoint, killed and resumed with a rank-less dict of RNG state there. Then compares every
rank's losses with the uninterrupted run's, bit for bit. Exits with 1 if the run with per-rank
streams differs anywhere.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from launch import torchrun

RANKS = 4
STEPS = 40
SAVE_EVERY = 10
DIE_AT_STEP = 25
DIE_RANK = 2
RECIPE = Path(__file__).with_name("train_fsdp2.py")


def train(out: Path, *arguments: str) -> Path:
    """Run the recipe from scratch into ``out``, with one restart allowed."""
    started = time.monotonic()
    print(f"{out.name:<36} ", end="", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    steps = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
    output = torchrun(RECIPE, RANKS, "--out", str(out), *steps, *arguments, restarts=1)
    (out / "log.txt").write_text(output)
    resumed = [line for line in output.splitlines() if line.startswith("resumed from")]
    print(f"{time.monotonic() - started:4.0f} s  {', '.join(resumed)}", flush=True)
    return out


def read_losses(out: Path, rank: int) -> list[tuple[int, str]]:
    """Return a rank's steps and losses, in the order in which they were trained."""
    lines = (out / f"losses-rank{rank}.txt").read_text().splitlines()
    return [(int(step), loss) for step, loss in map(str.split, lines)]


def first_difference(out: Path, reference: Path, rank: int) -> int | None:
    """Return the first step in which a rank's loss is not the reference's, bit for bit."""
    expected = dict(read_losses(reference, rank))
    found = read_losses(out, rank)
    differing = [step for step, loss in found if loss != expected[step]]
    missing = expected.keys() - {step for step, _ in found}
    return min([*differing, *missing], default=None)


def report(uninterrupted: Path, per_rank: Path, rank_less: Path) -> bool:
    """Print the table; return whether the run with per-rank streams is the uninterrupted one."""
    print(f"\nLosses of steps 0 to {STEPS - 1} against the uninterrupted run, bit for bit:\n")
    print(f"{'rank':>4}  {'per-rank streams':<22}  rank-less dict")
    all_equal = True
    for rank in range(RANKS):
        steps = [first_difference(run, uninterrupted, rank) for run in (per_rank, rank_less)]
        cells = ["equal" if step is None else f"differs from step {step}" for step in steps]
        print(f"{rank:>4}  {cells[0]:<22}  {cells[1]}")
        all_equal = all_equal and steps[0] is None
    return all_equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    out: Path = parser.parse_args().out

    kill = ["--die-at-step", str(DIE_AT_STEP), "--die-rank", str(DIE_RANK)]
    print(f"{RANKS} ranks, {STEPS} steps, a checkpoint every {SAVE_EVERY};")
    print(f"rank {DIE_RANK} is killed at step {DIE_AT_STEP} and torchrun restarts all ranks.\n")
    uninterrupted = train(out / "uninterrupted")
    per_rank = train(out / "killed, per-rank streams", *kill)
    rank_less = train(out / "killed, rank-less dict", *kill, "--rng", "rank-less")
    if not report(uninterrupted, per_rank, rank_less):
        print("\nFAILED: the resumed run with per-rank streams is not the uninterrupted one.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
