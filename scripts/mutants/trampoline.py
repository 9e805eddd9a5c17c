"""What mutmut calls instead of a function of the library, here with a note of which test called it.

``__main__.py`` puts a copy of it into the package, where every process finds it.
"""

from __future__ import annotations

import json
import os

from mutmut.mutation import trampoline
from mutmut.mutation.trampoline import MutantDict, wrap_in_trampoline

__all__ = ["MutantDict", "wrap_in_trampoline"]

_noted: set[tuple[str, str]] = set()


def _note(name: str, caller: str | None = None) -> None:
    # A fixture around every test reaches much of the library, too: there the variable is not set.
    test = os.environ.get("MUTANTS_TEST")
    if test and (test, name) not in _noted:
        _noted.add((test, name))
        # Many processes append lines to it, each in one piece.
        with open(os.environ["MUTANTS_NOTES"], "a", buffering=1) as file:
            file.write(json.dumps(["reached", test, name]) + "\n")


trampoline.record_trampoline_hit = _note  # type: ignore[attr-defined,unused-ignore]
