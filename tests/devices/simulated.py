"""A pytest on the simulated device, without the seconds of importing torch.

It is a fork of the fork server of forks.py, which imports no module that asks for a device.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

from tests.support import forks, ranks

FOLDER = Path(__file__).with_name("simulated_device")
LIMIT_SECONDS = 600


def on_the_device(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of a Python that finds the device where it imports torch."""
    path = os.pathsep.join([str(FOLDER), environment["PYTHONPATH"]])
    # torch warns that the device has collectives of its own.
    return {**environment, "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}


def run_pytest(arguments: list[str], output: Path) -> None:
    """Run pytest to its end in a process that has the device; what it prints is in ``output``."""
    process = forks.fork(_main, arguments, output, on_the_device(dict(os.environ)))
    process.join(LIMIT_SECONDS)
    process.kill()
    process.join()


def _main(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    ranks.print_to(output)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(FOLDER))
    importlib.import_module("simacc")  # as the import of torch does
    with ranks.forks_of_this_process():
        pytest.main(arguments)
