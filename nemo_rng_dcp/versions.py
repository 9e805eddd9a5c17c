"""Versions as numbers that a record can hold, and what Python fixed at its start."""

import os
import re
from functools import cache

__version__ = "0.1.0"

UNSEEDED = "random"
"""What Python takes for no ``PYTHONHASHSEED``: strings get other hashes at every start."""

# When the package is imported, before a job can set it: a later change has no effect on Python.
HASH_SEED = os.environ.get("PYTHONHASHSEED") or UNSEEDED
"""This process's ``PYTHONHASHSEED``."""


@cache
def version_number(text: str) -> int:
    """Return 2013000 for "2.13.0+cpu", 0 for what is no version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        return 0
    major, minor, micro = (int(part or 0) for part in match.groups())
    return major * 10**6 + minor * 10**3 + micro


def version_text(number: int) -> str:
    """Return "2.13.0" for 2013000."""
    return f"{number // 10**6}.{number // 10**3 % 10**3}.{number % 10**3}"
