"""The picture of the demo is drawn from its files, and says so if the runs are not equal."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import demo
import plot_resume

from test_recipe import write_losses

RUNS = ("uninterrupted", "killed, per-rank streams", "killed, rank-less dict")


def drawn(folder: Path, offsets: tuple[float, float, float]) -> tuple[str, dict[str, list[str]]]:
    """Draw a demo whose losses have these offsets; returns the text and the lines by colour."""
    for run, offset in zip(RUNS, offsets, strict=True):
        write_losses(folder / run, offset)
    picture = plot_resume.draw(folder)
    lines: dict[str, list[str]] = {}
    for element in ElementTree.fromstring(picture).iter():
        if element.tag.endswith("polyline"):
            lines.setdefault(element.attrib["stroke"], []).append(element.attrib["points"])
    return picture, lines


def test_equal_runs_lie_on_each_other(tmp_path: Path) -> None:
    picture, lines = drawn(tmp_path, (0.5, 0.5, 0.75))
    assert "per-rank streams: equal, bit for bit" in picture
    (whole,) = lines[plot_resume.GREY]
    resumed, *gaps = lines[plot_resume.GREEN]
    assert whole.split()[demo.RESUMED_STEP :] == resumed.split()
    assert len(gaps) == len(lines[plot_resume.RED]) - 1 == demo.RANKS
    assert set(gaps).isdisjoint(lines[plot_resume.RED])


def test_a_difference_is_not_called_equal(tmp_path: Path) -> None:
    picture, _ = drawn(tmp_path, (0.5, 0.5 + 2**-40, 0.75))
    assert "equal" not in picture
    assert "differs by up to 9.09495e-13" in picture


def test_the_committed_picture_is_of_a_run_that_holds() -> None:
    root = Path(__file__).parent.parent
    picture = (root / "scripts" / "resume.svg").read_text()
    assert "per-rank streams: equal, bit for bit" in picture
    assert re.search(r"!\[[^]]*\]\(scripts/resume\.svg\)", (root / "README.md").read_text())
