"""Draw what a kill does to a run's losses, from the files that the demo leaves.

    python -m scripts.demo.plot runs/demo scripts/resume.svg

Above, the loss of each step, averaged over the logical ranks: uninterrupted, resumed with a record
per rank on 2 processes, then on 1, resumed with RNG state under the same keys on every rank. Below,
for each logical rank, by how much the resumed runs differ from the uninterrupted one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from scripts.demo import runs
from scripts.demo.__main__ import (
    FEWER,
    RANK_LESS,
    RANKS,
    RESUMED_STEP,
    STEPS,
    UNINTERRUPTED,
    resumed_on,
)

GREY, GREEN, RED, INK = "#c3c9d1", "#11713f", "#cf2f3f", "#3b434e"


def losses(run: Path) -> npt.NDArray[np.float64]:
    """Return a run's losses, as they were last trained, ``(ranks, steps)``; nan: not trained."""
    found = [dict(runs.read_steps(run, rank)) for rank in range(RANKS)]
    return np.array(
        [[float.fromhex(steps.get(step, "nan")) for step in range(STEPS)] for steps in found]
    )


def draw(folder: Path) -> Figure:
    """Return the picture of the demo in ``folder``."""
    whole, rank_less = (losses(folder / run.name) for run in (UNINTERRUPTED, RANK_LESS))
    # From each run that was resumed on fewer processes, the steps before the next one took over.
    per_rank = np.full_like(whole, np.nan)
    for processes, step in FEWER.items():
        per_rank[:, step:] = losses(folder / resumed_on(processes).name)[:, step:]
    resumed = np.arange(RESUMED_STEP, STEPS)
    largest = np.abs(per_rank - whole)[:, resumed].max()
    exact = "equal, bit for bit" if largest == 0 else f"differs by up to {largest:g}"
    on = " processes, then ".join(map(str, FEWER))

    # A Figure of its own, not pyplot's: no window system, and nothing that outlives it.
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    above.plot(
        whole.mean(axis=0), color=GREY, linewidth=6, label=f"uninterrupted, {RANKS} processes"
    )
    above.plot(
        resumed,
        per_rank.mean(axis=0)[resumed],
        color=GREEN,
        label=f"resumed on {on}, per-rank streams: {exact}",
    )
    above.plot(
        resumed,
        rank_less.mean(axis=0)[resumed],
        color=RED,
        linestyle="--",
        label="resumed, the same keys on every rank",
    )
    above.set_title(f"loss, mean of {RANKS} logical ranks", loc="left")
    above.legend(frameon=False)
    below.plot(resumed, (rank_less - whole)[:, resumed].T, color=RED, linewidth=1)
    below.plot(resumed, (per_rank - whole)[:, resumed].T, color=GREEN, linewidth=2)
    below.set_title("difference from the uninterrupted run, each logical rank", loc="left")
    below.set_xlabel(f"step (killed after step {RESUMED_STEP}, resumed from it)")
    for axes in (above, below):
        axes.axvline(RESUMED_STEP, color=INK, linestyle=":", linewidth=1)
        axes.grid(axis="y", color="#e6e9ed")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the losses of the demo's runs.")
    parser.add_argument("demo", type=Path, help="the folder that the demo wrote")
    parser.add_argument("picture", type=Path, help="the file to write: .svg, .png or .pdf")
    arguments = parser.parse_args()
    # Text as text, and the same bytes for the same losses.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nemo_rng_dcp"})
    draw(arguments.demo).savefig(arguments.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
