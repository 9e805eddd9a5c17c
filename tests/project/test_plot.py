"""The picture of the demo is drawn from its files, and says so if the runs are not equal."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scripts.demo import __main__ as demo
from scripts.demo import plot
from tests.project.test_demo import write_demo


def drawn(folder: Path, per_rank: float) -> Figure:
    """Draw a demo of which the runs with per-rank streams have this offset."""
    write_demo(folder, per_rank)
    return plot.draw(folder)


def lines(figure: Figure, panel: int, colour: str) -> list[NDArray[np.float64]]:
    """Return the heights of the lines of a colour."""
    return [
        np.asarray(line.get_ydata())
        for line in figure.axes[panel].get_lines()
        if line.get_color() == colour
    ]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_equal_runs_lie_on_each_other(tmp_path: Path) -> None:
    figure = drawn(tmp_path, 0.5)
    assert "resumed on 2 processes, then 1, per-rank streams: equal, bit for bit" in legend(figure)
    (whole,), (resumed,) = lines(figure, 0, plot.GREY), lines(figure, 0, plot.GREEN)
    assert (whole[demo.RESUMED_STEP :] == resumed).all()
    assert [line.tolist() for line in lines(figure, 1, plot.GREEN)] == [[0.0] * 20] * demo.RANKS
    assert [line.tolist() for line in lines(figure, 1, plot.RED)] == [[0.25] * 20] * demo.RANKS


def test_a_difference_is_not_called_equal(tmp_path: Path) -> None:
    figure = drawn(tmp_path, 0.5 + 2**-40)
    assert any("per-rank streams: differs by up to 9.09495e-13" in text for text in legend(figure))


def test_the_same_losses_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_demo(tmp_path, rank_less=0.5)
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    with matplotlib.rc_context():
        for picture in pictures:
            monkeypatch.setattr("sys.argv", ["plot", str(tmp_path), str(picture)])
            plot.main()
    first, second = (picture.read_text() for picture in pictures)
    assert first == second
    assert "equal, bit for bit" in first


def test_the_committed_picture_is_of_a_run_that_holds() -> None:
    root = Path(__file__).parents[2]
    assert "per-rank streams: equal, bit for bit" in (root / "scripts" / "resume.svg").read_text()
    assert "](scripts/resume.svg)" in (root / "README.md").read_text()
