"""The suite under several interpreters, and a table of what it found: ``make test-versions``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ASK = (
    "import platform, torch, numpy; "
    "print(platform.python_version(), torch.__version__, numpy.__version__)"
)
COLUMNS = ("python", "torch", "numpy", "passed", "skipped", "failed")


def run(python: str) -> tuple[bool, list[str]]:
    """Run the suite; return whether it passed and its row of the table."""
    asked = subprocess.run([python, "-c", ASK], stdout=subprocess.PIPE, text=True, check=True)
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        report = Path(folder) / "report.xml"
        suite = [python, "-m", "pytest", "-n", "2", f"--junit-xml={report}"]
        passed = subprocess.run(suite, check=False).returncode == 0
        counts = count(report) if report.exists() else ["", "", "no report"]
    return passed, [*asked.stdout.split(), *counts]


def count(report: Path) -> list[str]:
    """Return how many tests passed, were skipped and failed; an error of a fixture is a failure."""
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    total, skipped, failures, errors = (
        int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")
    )
    failed = failures + errors
    return [str(number) for number in (total - skipped - failed, skipped, failed)]


def main(pythons: list[str]) -> int:
    results = [run(python) for python in pythons]
    print()
    for row in (COLUMNS, *(row for _, row in results)):
        print("  ".join(f"{cell:14}" for cell in row).rstrip())
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
