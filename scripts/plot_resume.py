"""Draw what a kill does to a run's losses, from the files that the demo leaves.

    python scripts/plot_resume.py runs/demo scripts/resume.svg

Above, the loss of each step, averaged over the ranks: uninterrupted, resumed with per-rank streams,
resumed with rank-less keys. Below, for each rank, by how much the two resumed runs differ from the
uninterrupted one. The SVG is written by hand, so that no plotting library has to be installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path

from demo import DIE_AT_STEP, RANKS, RESUMED_STEP, STEPS, read_losses

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT = 62, 16
GREY, GREEN, RED, INK = "#c3c9d1", "#11713f", "#cf2f3f", "#3b434e"

Points = Sequence[tuple[int, float]]


def losses(run: Path, rank: int, first: int = 0) -> list[tuple[int, float]]:
    """Return a rank's steps from ``first`` on and their losses, as they were last trained."""
    last = dict(read_losses(run, rank))
    return [(step, float.fromhex(loss)) for step, loss in sorted(last.items()) if step >= first]


def mean(runs: Sequence[Points]) -> list[tuple[int, float]]:
    """Return the average of several ranks' losses, by step."""
    return [
        (points[0][0], sum(loss for _, loss in points) / len(points))
        for points in zip(*runs, strict=True)
    ]


def minus(points: Points, reference: Points) -> list[tuple[int, float]]:
    """Return the differences from a reference, by step."""
    expected = dict(reference)
    return [(step, loss - expected[step]) for step, loss in points]


@dataclass
class Panel:
    """A box with axes: steps to the right, values up."""

    top: int
    bottom: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / (STEPS - 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * share

    def axes(self, title: str, ticks: Iterable[float]) -> list[str]:
        parts = [label(LEFT, self.top - 10, title, "bold")]
        for value in ticks:
            y = self.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e6e9ed"/>')
            parts.append(
                label(LEFT - 8, y + 4, f"{value:g}".replace("-", "\N{MINUS SIGN}"), anchor="end")
            )
        return parts

    def line(self, points: Points, colour: str, width: float, dashes: str = "") -> str:
        path = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
            f'{dashed} stroke-linejoin="round" stroke-linecap="round"/>'
        )

    def mark(self, step: int, text: str) -> list[str]:
        x = self.x(step)
        return [
            f'<path d="M{x:.1f} {self.top}V{self.bottom}" stroke="{INK}" stroke-dasharray="2 4"/>',
            label(x + 5, self.top + 12, text) if text else "",
        ]


def label(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}">{text}</text>'
    )


def ticks_between(low: float, high: float) -> list[float]:
    """Return about five round numbers from ``low`` to ``high``, neither left out."""
    step = 10.0 ** floor(log10((high - low) / 2))
    step = next(step * factor for factor in (0.5, 1, 2, 5) if (high - low) / (step * factor) <= 5)
    return [step * number for number in range(floor(low / step), ceil(high / step) + 1)]


def draw(folder: Path) -> str:
    """Return the picture of the demo in ``folder`` as SVG."""
    ranks = range(RANKS)
    whole = [losses(folder / "uninterrupted", rank) for rank in ranks]
    per_rank, rank_less = (
        [losses(folder / f"killed, {name}", rank, RESUMED_STEP) for rank in ranks]
        for name in ("per-rank streams", "rank-less dict")
    )
    gaps = [minus(run, reference) for run, reference in zip(rank_less, whole, strict=True)]
    no_gaps = [minus(run, reference) for run, reference in zip(per_rank, whole, strict=True)]

    heights = [loss for points in (mean(whole), mean(rank_less)) for _, loss in points]
    ticks = ticks_between(min(heights), max(heights))
    above = Panel(64, 250, ticks[0], ticks[-1])
    depths = [gap for run in [*gaps, *no_gaps] for _, gap in run]
    gap_ticks = ticks_between(min(depths), max(depths))
    below = Panel(292, 404, gap_ticks[0], gap_ticks[-1])

    parts = [
        *above.axes(f"loss, mean of {RANKS} ranks", ticks),
        *above.mark(RESUMED_STEP, f"resumed here, after a kill in step {DIE_AT_STEP}"),
        above.line(mean(whole), GREY, 7),
        above.line(mean(rank_less), RED, 2, "6 4"),
        above.line(mean(per_rank), GREEN, 2),
        *below.axes("difference from the uninterrupted run, each rank", gap_ticks),
        *below.mark(RESUMED_STEP, ""),
        *(below.line(run, RED, 1.3) for run in gaps),
        *(below.line(run, GREEN, 2.5) for run in no_gaps),
    ]
    for step in range(0, STEPS, 5):
        parts.append(label(below.x(step), below.bottom + 18, str(step), anchor="middle"))
    parts.append(label(below.x(STEPS - 1), below.bottom + 18, "step", anchor="end"))
    largest = max(abs(gap) for run in no_gaps for _, gap in run)
    exact = "equal, bit for bit" if largest == 0 else f"differs by up to {largest:g}"
    names = [
        (GREY, 7, "", "uninterrupted"),
        (GREEN, 2, "", f"per-rank streams: {exact}"),
        (RED, 2, "6 4", "rank-less keys"),
    ]
    x = float(LEFT)
    for colour, width, dashes, text in names:
        stroke = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes or "none"}"'
        parts += [f'<path d="M{x} 24h28" {stroke}/>', label(x + 36, 28, text)]
        x += 60 + 6.5 * len(text)
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the losses of the demo's runs.")
    parser.add_argument("demo", type=Path, help="the folder that the demo wrote")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    arguments = parser.parse_args()
    arguments.picture.write_text(draw(arguments.demo))


if __name__ == "__main__":
    main()
