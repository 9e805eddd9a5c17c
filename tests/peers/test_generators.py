"""NumPy's tests of its generators and Python's of ``random``, on streams that come back.

They hold the numbers that each generator has to give, known answers among them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]

NUMPY = ["--pyargs", "numpy.random.tests"]
# unittest runs no class that is no TestCase, such as the one that the others are made of.
PYTHON = ["-o", "python_classes=", "--pyargs", "test.test_random"]

# What the plugin itself changes: NumPy's pickles name its own class; a warning names the file that
# called; a method that a test puts into random.Random is put into the plugin's class.
NOT_OURS = {
    "test_pickle",
    "test_shuffle_untyped_warning",
    "test_betavariate_return_zero",
    "test_gammavariate_alpha_between_zero_and_one",
    "test_gammavariate_alpha_equal_one",
    "test_gammavariate_alpha_equal_one_equals_expovariate",
    "test_gammavariate_alpha_greater_one",
}

BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


@dataclass
class Outcome:
    passed: int
    skipped: int
    failed: list[str]
    resumed: Counter[str]
    left_out: Counter[str]


def run(folder: Path, tests: list[str], fault: str = "") -> Outcome:
    """Run tests that a package ships, with the plugin, in a process of their own."""
    (folder / "pytest.ini").touch()  # not this project's
    report, notes = folder / "report.xml", folder / "notes.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "--tb=short"]
    command += ["-p", "tests.peers.resumed", f"--junit-xml={report}", *tests]
    environment = {"PYTHONPATH": str(ROOT), "PEERS_REPORT": str(notes), "PEERS_FAULT": fault}
    subprocess.run(command, env={**os.environ, **environment}, cwd=folder, check=False)
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    failed, skipped = [], 0
    for case in suite.iter("testcase"):
        failed += [case.attrib["name"]] * bool(case.findall("failure") or case.findall("error"))
        skipped += bool(case.findall("skipped"))
    counts: dict[str, Any] = json.loads(notes.read_text())
    passed = int(suite.attrib["tests"]) - skipped - len(failed)
    return Outcome(passed, skipped, failed, Counter(counts["resumed"]), Counter(counts["left_out"]))


def test_numpy_on_resumed_streams(tmp_path: Path) -> None:
    found = run(tmp_path, NUMPY)
    print(found)
    assert {name.partition("[")[0] for name in found.failed} <= NOT_OURS
    assert len(found.failed) <= 9 < 1000 < found.passed
    kinds = ["numpy", "global", *(f"numpy.{kind}" for kind in BIT_GENERATORS)]
    assert all(found.resumed[kind] >= 400 for kind in kinds), found.resumed
    # A RandomState over another bit generator than MT19937; a Random that is being constructed.
    reasons = ("only MT19937, NumPy's default, can be stored", "gauss_next")
    assert all(any(reason in why for reason in reasons) for why in found.left_out), found.left_out


@pytest.mark.skipif(find_spec("test.test_random") is None, reason="Python without its own tests")
def test_python_on_resumed_streams(tmp_path: Path) -> None:
    found = run(tmp_path, PYTHON)
    print(found)
    assert set(found.failed) <= NOT_OURS
    assert len(found.failed) <= 5 < 80 < found.passed
    assert found.resumed["python"] > 5000


@pytest.mark.parametrize(
    "tests",
    [
        ["-k", "TestRandomDist", "--pyargs", "numpy.random.tests.test_generator_mt19937"],
        ["-k", "TestRandomDist", "--pyargs", "numpy.random.tests.test_randomstate"],
        ["-k", "eferenceImplementation", *PYTHON],
    ],
    ids=["numpy", "legacy numpy", "python"],
)
def test_a_load_of_another_state_is_noticed(tests: list[str], tmp_path: Path) -> None:
    found = run(tmp_path, tests, fault="moved")
    assert sum(found.resumed.values()) > 10
    assert len(found.failed) > found.passed / 2
