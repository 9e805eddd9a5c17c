"""Processes that have the simulated device, without the seconds of importing torch.

They are forks of the fork server of forks.py, which imports no module that asks for a device.
"""

import importlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import forks, ranks

FOLDER = Path(__file__).with_name("simulated_device")
LIMIT_SECONDS = 600


def run(function: Callable[..., object], *arguments: object, output: Path) -> int | None:
    """Run a function in a process that has the device; what it prints is in ``output``.

    Returns:
        The exit code of the process.
    """
    path = os.pathsep.join([str(FOLDER), os.environ["PYTHONPATH"]])
    # torch warns that the device has collectives of its own.
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    process = forks.fork(_main, pickle.dumps((function, arguments)), output, environment)
    process.join(LIMIT_SECONDS)
    process.kill()
    process.join()
    return process.exitcode


def run_pytest(*arguments: str) -> None:
    """Run pytest, in a process that has the device, on ranks that have it."""
    with ranks.forks_of_this_process():
        pytest.main([*arguments])


def _main(call: bytes, output: Path, environment: dict[str, str]) -> None:
    ranks.print_to(output)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(FOLDER))
    importlib.import_module("simacc")  # as the import of torch does
    function: Callable[..., object]
    function, arguments = pickle.loads(call)  # imports modules that ask for the device
    function(*arguments)
