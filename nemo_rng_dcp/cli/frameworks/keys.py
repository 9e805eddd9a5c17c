"""Which keys of a checkpoint are RNG state that other code stored, and which rank each names.

They are told by name, dtype and shape together; nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from nemo_rng_dcp.cli.checkpoint.checkpoint import Checkpoint
from nemo_rng_dcp.cli.checkpoint.index import Stored
from nemo_rng_dcp.grids import is_name

_GENERATORS = {"python", "random", "numpy", "np", "torch", "cpu", "cuda", "xpu", "mps"}
_TORCH_CPU_BYTES, _ACCELERATOR_BYTES = 5056, (16, 816)
_MT19937_WORDS = (624, 625)
_RANK = re.compile(r"rank[_.:/-]?(\d{1,9})(?!\d)")
_NUMBER = re.compile(r"(?<=[_./:-])(\d{1,9})(?=[_./:-]|$)")


class ForeignKey(NamedTuple):
    """A key of RNG state.

    Attributes:
        key: The key.
        path: What it shares with others; ``*`` stands for the rank.
        rank: The rank in it, if it names one.
        rest: What it has besides.
    """

    key: str
    path: str
    rank: int | None
    rest: str


def find_keys(checkpoint: Checkpoint) -> list[ForeignKey]:
    """Return the keys of RNG state that no ``StatefulRNG`` stored, in their order."""
    keys = {k: its for k, its in checkpoint.keys.items() if not is_name(k.rpartition(".")[2])}
    beside = _sets_of_generators(keys)
    return [
        ForeignKey(key, *_split(key))
        for key in sorted(keys)
        if _is_rng_state(key, keys[key], key in beside)
    ]


def _is_rng_state(key: str, stored: Stored, beside_others: bool) -> bool:
    if stored.dtype is None:
        return beside_others or _says_rng(key)
    last = stored.size[-1] if stored.size else 0
    if stored.dtype == "uint8" and last == _TORCH_CPU_BYTES:
        return True
    named = beside_others or _says_rng(key) or _says_generator_state(key)
    if stored.dtype == "uint8":
        return named and last in _ACCELERATOR_BYTES
    return named and "int" in stored.dtype and len(stored.size) == 1 and last in _MT19937_WORDS


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _says_rng(key: str) -> bool:
    words = _words(key)
    return bool({"rng", "rngs"} & set(words)) or any(
        first == "random" and then in ("state", "states") for first, then in pairwise(words)
    )


def _says_generator_state(key: str) -> bool:
    """Return whether a key may be a generator's: of random numbers, or a network."""
    return any(
        first in ("generator", "generators") and then in ("state", "states")
        for first, then in pairwise(_words(key))
    )


def _sets_of_generators(keys: Iterable[str]) -> set[str]:
    """Return keys such as ``state.python`` and ``state.numpy``, where two or more stand together.

    One alone, ``data.numpy``, may be anything.
    """
    sets: dict[str, set[str]] = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        if name.lower() in _GENERATORS:
            sets.setdefault(path, set()).add(key)
    return {key for together in sets.values() if len(together) > 1 for key in together}


def _split(key: str) -> tuple[str, int | None, str]:
    """Return the path that a key shares with others, the rank in it, and what follows."""
    match = _RANK.search(key.lower()) or _numbered(key)
    if match:
        return f"{key[: match.start(1)]}*", int(match[1]), key[match.end() :].lstrip("._/:-")
    path, _, name = key.rpartition(".")
    while _GENERATORS & set(_words(path.rpartition(".")[2])):
        path, _, last = path.rpartition(".")
        name = f"{last}.{name}"
    return path, None, name


def _numbered(key: str) -> re.Match[str] | None:
    """Return the number that stands for a rank in ``rng/3`` or ``rng_states.3.python``."""
    for match in _NUMBER.finditer(key):
        before, separator = key[: match.start() - 1], key[match.start() - 1]
        last = before.rpartition(".")[2]
        # DCP takes lists apart: ".0" after a generator's name is a device or one of its words.
        if _says_rng(before) and not (separator == "." and _GENERATORS & set(_words(last))):
            return match
    return None
