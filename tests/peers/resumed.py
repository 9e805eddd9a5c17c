"""A pytest plugin: every call of a generator finds a stream that was saved, moved and loaded.

``-p tests.peers.resumed`` puts NumPy's and Python's generators, and the functions of their modules,
behind it before any test is imported. Tests that know nothing of this library then say whether the
stream that comes back is the one that was there. ``PEERS_REPORT`` names the file for what it did.

Of a test that calls more than 500 times, it is every 97th call from there on.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_rng_dcp import RNGStateError, StatefulRNG
from tests.support.records import record_of

FAULT = os.environ.get("PEERS_FAULT", "")
"""For the control: what is wrong with each load."""

RESUMED: Counter[str] = Counter()
"""Calls before which a stream came back, by the kind of the generator."""
LEFT_OUT: Counter[str] = Counter()
"""Calls of generators that the library refuses to store, by its reason."""

CALLS: Counter[str] = Counter()
"""How often the test that runs now has called."""

_inside = threading.local()


def resume(generator: object, draw: Callable[[], object]) -> None:
    """Save, draw and load a generator; ``None``: the global ones."""
    options: dict[str, Any] = {}
    if "random" in getattr(generator, "__dict__", ()):
        LEFT_OUT["the test gave it a random() of its own"] += 1
        return
    if generator is not None:
        options = {"generators": {"peer": generator}, "global_generators": False}
    try:
        rng = StatefulRNG(None, **options)
        state: Any = rng.state_dict()
    # The first: Random.__init__ seeds before the object has all of its attributes.
    except (AttributeError, RNGStateError, TypeError, ValueError) as error:
        LEFT_OUT[str(error)] += 1
        return
    draw()
    if FAULT == "moved":
        state = rng.state_dict()
    rng.load_state_dict(state)
    RESUMED["global" if generator is None else record_of(state).streams["peer"].kind] += 1


class Call:
    """A method of a generator whose every call finds a stream that has come back.

    As NumPy's own methods, it stays what it is where a class has it as an attribute, and is equal
    to what is asked for a second time.
    """

    def __init__(
        self, method: Callable[..., Any], generator: object, draw: Callable[[], object]
    ) -> None:
        self._method, self._generator, self._draw = method, generator, draw
        functools.update_wrapper(self, method)
        self.__self__ = getattr(method, "__self__", None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self._method == other._method

    def __hash__(self) -> int:
        return hash(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What a method of Python's asks of its own object is a part of one call.
        own = sys._getframe(1).f_globals is vars(random)
        if not own and not getattr(_inside, "now", False):
            CALLS["now"] += 1
            _inside.now = True
            try:
                if CALLS["now"] <= 500 or CALLS["now"] % 97 == 0:
                    resume(self._generator, self._draw)
            finally:
                _inside.now = False
        return self._method(*args, **kwargs)


def draw_from_generator(generator: np.random.Generator) -> None:
    generator.integers(2**16, size=3, dtype=np.uint16)  # leaves half a word behind
    generator.standard_normal()
    generator.bit_generator.random_raw()
    sequence = generator.bit_generator.seed_seq
    if isinstance(sequence, np.random.SeedSequence):
        sequence.spawn(1)


def draw_from_legacy(generator: Any) -> None:
    """Of a RandomState, or of the module: the second normal of a pair is kept."""
    generator.standard_normal(3)
    generator.randint(2**31)


def draw_from_python(generator: Any) -> None:
    generator.gauss(0, 1)
    generator.getrandbits(40)


def behind(kind: type, draw: Callable[[Any], object]) -> Any:
    """Return a class of generators whose methods are :class:`Call`."""

    def get(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if name.startswith("_") or not callable(value) or getattr(_inside, "now", False):
            return value
        return Call(value, self, functools.partial(draw, self))

    class Kind(type):
        # What was made by C code, or before this, is still a generator to those who ask.
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, kind) if cls is made else type.__instancecheck__(cls, value)

    members = {"__getattribute__": get, "__module__": kind.__module__}
    made = Kind(kind.__name__, (kind,), members)
    return made


def put_behind(module: Any, owner: object, draw: Callable[[], object]) -> None:
    """Do the same to the functions of a module, which are methods of a hidden generator."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__self__", None) is owner:
            setattr(module, name, Call(value, None, draw))


def default_rng(seed: Any = None) -> np.random.Generator:
    made = _default_rng(seed)
    return np.random.Generator(made.bit_generator) if type(made) is _Generator else made


_default_rng, _Generator = np.random.default_rng, np.random.Generator
put_behind(np.random, np.random.mtrand._rand, lambda: draw_from_legacy(np.random))  # type: ignore[attr-defined]
put_behind(random, random._inst, lambda: draw_from_python(random))  # type: ignore[attr-defined]
np.random.default_rng = default_rng  # type: ignore[assignment]
for module, name, draw in (
    (np.random, "Generator", draw_from_generator),
    (np.random, "RandomState", draw_from_legacy),
    (random, "Random", draw_from_python),
):
    setattr(module, name, behind(getattr(module, name), draw))


def pytest_runtest_setup() -> None:
    CALLS.clear()


def pytest_sessionfinish() -> None:
    report = {"resumed": RESUMED, "left_out": LEFT_OUT}
    Path(os.environ["PEERS_REPORT"]).write_text(json.dumps(report))
