"""Show what a kill does to the random streams, with and without one state per rank.

Trains the recipe on 4 ranks three times: uninterrupted, killed and resumed with ``StatefulRNG`` in
the checkpoint, killed and resumed with a rank-less dict of RNG state there. Then compares every
rank's losses with the uninterrupted run's, bit for bit. Exits with 1 if the run with per-rank
streams differs anywhere.
"""

from __future__ import annotations

import json
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
RESUMED_STEP = 20
FEWER, MORE = 2, 6
RECIPE = Path(__file__).with_name("train_fsdp2.py")


def train(out: Path, *arguments: str, ranks: int = RANKS) -> Path:
    """Run the recipe into ``out``, with one restart allowed."""
    started = time.monotonic()
    print(f"{out.name:<36} ", end="", flush=True)
    steps = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--keep", "3"]
    output = torchrun(RECIPE, ranks, "--out", str(out), *steps, *arguments, restarts=1)
    (out / "log.txt").write_text(output)
    resumed = [line for line in output.splitlines() if line.startswith("resumed from")]
    print(f"{time.monotonic() - started:4.0f} s  {', '.join(resumed)}".rstrip(), flush=True)
    return out


def resume_on(ranks: int, killed: Path, out: Path) -> Path:
    """Resume the checkpoint from which the killed run went on, on another number of ranks."""
    checkpoint = Path("checkpoints", f"step-{RESUMED_STEP:08d}")
    shutil.copytree(killed / checkpoint, out / checkpoint)
    return train(out, ranks=ranks)


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


def read_streams(out: Path, rank: int, event: str) -> dict[str, str]:
    """Return the fingerprints of a rank's streams when step 20 was first saved or restored."""
    lines = (out / f"streams-rank{rank}.jsonl").read_text().splitlines()
    for note in map(json.loads, lines):
        if (note["event"], note["step"]) == (event, RESUMED_STEP):
            return dict(note["streams"])
    raise LookupError(f"{out.name}: rank {rank} never {event} its streams at step {RESUMED_STEP}")


def fates(ranks: int, out: Path, killed: Path) -> list[str]:
    """Return what became of each rank's streams, by their fingerprints alone."""
    saved = [read_streams(killed, rank, "saved") for rank in range(RANKS)]
    restored = [read_streams(out, rank, "restored") for rank in range(ranks)]
    found = []
    for rank, streams in enumerate(restored):
        others = saved + restored[:rank] + restored[rank + 1 :]
        taken = {digits for other in others for digits in other.values()}
        if rank < RANKS and streams == saved[rank]:
            found.append("continued")
        else:
            found.append("MIXED UP" if taken & set(streams.values()) else "forked")
    return found + ["dropped"] * (RANKS - ranks)


def report_fates(killed: Path, fewer: Path, more: Path) -> bool:
    """Print the table; return whether every stream is what the rules say."""
    on_fewer, on_more = fates(FEWER, fewer, killed), fates(MORE, more, killed)
    print(f"\nStreams of the checkpoint of step {RESUMED_STEP}, saved by {RANKS} ranks:\n")
    print(f"{'rank':>4}  {f'resumed on {FEWER} ranks':<22}  resumed on {MORE} ranks")
    for rank in range(MORE):
        first = on_fewer[rank] if rank < RANKS else "-"
        print(f"{rank:>4}  {first:<22}  {on_more[rank]}")
    return on_fewer == ["continued"] * FEWER + ["dropped"] * (RANKS - FEWER) and on_more == [
        "continued"
    ] * RANKS + ["forked"] * (MORE - RANKS)


def main() -> int:
    out = Path("runs", "demo")
    shutil.rmtree(out, ignore_errors=True)

    kill = ["--die-at-step", str(DIE_AT_STEP), "--die-rank", str(DIE_RANK)]
    print(f"{RANKS} ranks, {STEPS} steps, a checkpoint every {SAVE_EVERY};")
    print(f"rank {DIE_RANK} is killed at step {DIE_AT_STEP} and torchrun restarts all ranks.\n")
    uninterrupted = train(out / "uninterrupted")
    per_rank = train(out / "killed, per-rank streams", *kill)
    rank_less = train(out / "killed, rank-less dict", *kill, "--rng", "rank-less")
    fewer = resume_on(FEWER, per_rank, out / f"killed, resumed on {FEWER} ranks")
    more = resume_on(MORE, per_rank, out / f"killed, resumed on {MORE} ranks")

    equal = report(uninterrupted, per_rank, rank_less)
    as_ruled = report_fates(per_rank, fewer, more)
    if not equal:
        print("\nFAILED: the resumed run with per-rank streams is not the uninterrupted one.")
    if not as_ruled:
        print("\nFAILED: on another number of ranks, some stream is not what the rules say.")
    return 0 if equal and as_ruled else 1


if __name__ == "__main__":
    sys.exit(main())
