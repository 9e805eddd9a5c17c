"""The tests of an accelerator's streams, on the simulated device beside this file.

They run in one process that has the device, and are reported here one by one.
"""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import RNGLoadPlanner, RNGStateWarning, StatefulRNG
from tests.devices import test_accelerator, test_accelerator_jobs
from tests.devices.simulated import run, run_pytest
from tests.support.streams import draw, warned

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the simulated device"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ElementTree.Element]]:
    """The tests' outcomes by name, once for each set of parameters."""
    folder = tmp_path_factory.mktemp("simulated")
    report, output = folder / "report.xml", folder / "output"
    files = [str(module.__file__) for module in (test_accelerator, test_accelerator_jobs)]
    run(run_pytest, "-p", "no:cacheprovider", f"--junitxml={report}", *files, output=output)
    assert report.exists(), output.read_text()
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        cases.setdefault(case.attrib["name"].partition("[")[0], []).append(case)
    return cases


@pytest.mark.parametrize(
    "test",
    [
        name
        for module in (test_accelerator, test_accelerator_jobs)
        for name in vars(module)
        if name.startswith("test_") and callable(getattr(module, name))
    ],
)
def test_on_the_simulated_device(outcomes: dict[str, list[ElementTree.Element]], test: str) -> None:
    assert test in outcomes
    for case in outcomes[test]:
        for outcome in case:
            if outcome.tag == "skipped":
                pytest.skip(outcome.attrib["message"])
            if outcome.tag in ("failure", "error"):
                pytest.fail(f"{case.attrib['name']}\n{outcome.text}", pytrace=False)


def load_and_save(folder: Path, other: Path) -> None:
    """Print what is drawn behind a load, its warnings, and what is drawn behind a save."""
    rng = StatefulRNG(7)
    planner = RNGLoadPlanner()
    messages = warned(lambda: dcp.load({"rng": rng}, checkpoint_id=folder, planner=planner))
    drawn = draw()
    dcp.save({"rng": rng}, checkpoint_id=other)
    print(json.dumps([drawn, messages, draw()]))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_go_from_a_cpu_machine_to_an_accelerator_and_back(tmp_path: Path) -> None:
    dcp.save({"rng": StatefulRNG(42)}, checkpoint_id=tmp_path / "cpu")
    expected = draw()
    folders, output = (tmp_path / "cpu", tmp_path / "simacc"), tmp_path / "output"
    assert run(load_and_save, *folders, output=output) == 0, output.read_text()
    drawn, messages, expected_next = json.loads(output.read_text().splitlines()[-1])
    assert drawn == expected
    assert any(
        "the checkpoint has no simacc: the stream stays as it is" in message for message in messages
    )
    rng = StatefulRNG(7)
    with pytest.warns(RNGStateWarning, match="has simacc, which this job does not have: ignored"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path / "simacc", planner=RNGLoadPlanner())
    assert draw() == expected_next
