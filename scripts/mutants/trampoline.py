"""What calls a function of the library: as it is, or with the fault that the environment names.

``faults.py`` puts a copy of it into the package, where every process finds it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

MutantDict = dict[str, Callable[..., Any]]

_noted: set[tuple[str, str]] = set()


def wrap_in_trampoline(faulty: MutantDict, is_classmethod: bool = False) -> Callable[..., Any]:
    """Return the decorator that mutmut's code expects; ``faulty`` is filled after it ran."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            chosen = faulty["_mutmut_orig"]
            _note(f"{chosen.__module__}.{chosen.__name__.removesuffix('__mutmut_orig')}")
            module, _, fault = os.environ.get("MUTANT_UNDER_TEST", "").rpartition(".")
            if module == chosen.__module__:
                chosen = faulty.get(fault, chosen)
            return chosen(*args[is_classmethod:], **kwargs)  # a class method is bound already

        # warnings does not count importlib's frames: a stacklevel means what it does without this.
        call.__code__ = call.__code__.replace(co_filename="importlib._bootstrap")
        return functools.wraps(function)(call)

    return decorate


def _note(function: str) -> None:
    # A fixture around every test reaches much of the library, too: there the variable is not set.
    test = os.environ.get("MUTANTS_TEST")
    if test and (test, function) not in _noted:
        _noted.add((test, function))
        # Many processes append lines to it, each in one piece.
        with open(os.environ["MUTANTS_NOTES"], "a", buffering=1) as file:
            file.write(json.dumps(["reached", test, function]) + "\n")
