"""``explain`` foretells what real loads do."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from asking import Capture, ask
from records import change_metadata, records, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_many_fates_are_summarised(tmp_path: Path, capsys: Capture) -> None:
    path = save(records(300), tmp_path)
    code, text = ask(capsys, "explain", path, "--world-size", 400)
    assert code == 0
    assert "rows 0-299: continued rows 300-399: forked, from rows 0-99" in text
    _, text = ask(capsys, "explain", path, "--world-size", 400, "--rows", "299-300")
    assert re.search(r"299 299 continued .* 300 300 forked, from 0 ", text)


def test_the_rules_are_those_of_a_load(tmp_path: Path, capsys: Capture) -> None:
    alike = save(records(4, ranked=False), tmp_path)
    code, text = ask(capsys, "explain", alike, "--world-size", 5)
    assert (code, "copied, from 0" in text) == (0, True)
    assert "forked, from 0" in ask(capsys, "explain", alike, "--world-size", 5, "--ranked")[1]
    text = ask(capsys, "explain", alike, "--world-size", 4)[1]
    assert "with plain dcp.load" in text
    text = ask(capsys, "explain", alike, "--world-size", 4, "--generators", "numpy,cuda")[1]
    assert "the checkpoint has no cuda: the stream stays as it is" in text
    assert "the checkpoint has python, torch, which this job has not: dropped" in text
    assert "planner=RNGLoadPlanner()" in text


@pytest.mark.parametrize(
    "bad", [["--mesh", "dp=3"], ["--mesh", "dp=4", "--along", "tp"], ["--along", "dp"]]
)
def test_a_mesh_that_does_not_fit_is_refused(
    bad: list[str], tmp_path: Path, capsys: Capture
) -> None:
    path = save(records(1), tmp_path)
    assert ask(capsys, "explain", path, "--world-size", 4, *bad)[0] == 2


def test_rows_that_are_only_claimed_cost_nothing(tmp_path: Path, capsys: Capture) -> None:
    """An entry was built for every row that .metadata claims."""
    path = save(records(2), tmp_path)

    def enlarge(metadata: Any) -> None:
        (table,) = metadata.state_dict_metadata.values()
        table.size = torch.Size([2**60 * table.chunks[0].sizes[0] // 2**12])

    change_metadata(path, enlarge)
    code, text = ask(capsys, "explain", path, "--world-size", 2)
    assert (code, "a load raises" in text) == (1, True)
    code, text = ask(capsys, "inspect", path)
    assert code == 1
    assert re.search(r"\d{12,} of \d{12,} rows are missing, the first is 2", text)
