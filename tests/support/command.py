"""How tests ask the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rng_dcp.cli.main import main
from tests.support.streams import unmoved

INSTALLED = str(Path(sys.executable).with_name("nemo-rng-dcp"))
Capture = pytest.CaptureFixture[str]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    words = [INSTALLED, *map(str, arguments)]
    return subprocess.run(words, text=True, timeout=100, check=False, **options)


def ask(capsys: Capture, *arguments: object) -> tuple[int, str]:
    """Run the command in this process, which takes no seconds to start and moves no stream.

    Returns:
        The exit code, and what was printed with single spaces, so that no line's end matters.
    """
    with unmoved():
        code = main([*map(str, arguments)])
    out, error = capsys.readouterr()
    assert max(map(len, out.splitlines()), default=0) <= 80, out
    return code, " ".join((out + error).split())


def ask_json(capsys: Capture, *arguments: object) -> Any:
    """Run the command with ``--json`` and return what it printed."""
    with unmoved():
        code = main([*map(str, arguments), "--json"])
    assert code in (0, 1)
    return json.loads(capsys.readouterr().out)
