"""Which keys of a checkpoint are RNG state that other code stored, and which rank each names.

They are told by name, dtype and shape together; nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.index import Stored
from nemo_rng_dcp.keys import is_name

MEGATRON_SHARD = "rng_state/shard_"
"""How Megatron's keys begin. The numbers in them are coordinates, and no ranks."""

_GENERATORS = {"python", "random", "numpy", "np", "torch", "cpu", "cuda", "xpu", "mps"}
_TORCH_CPU_BYTES, _ACCELERATOR_BYTES = 5056, (16, 816)
_MT19937_WORDS = (624, 625)
_RNG = re.compile(r"(?<![a-z])(rngs?|random[^a-z]+states?)(?![a-z])", re.IGNORECASE)
_GENERATOR = re.compile(r"(?<![a-z])generators?[^a-z]+states?(?![a-z])", re.IGNORECASE)
"""It may be one of random numbers, or a network."""
_RANK = re.compile(r"rank[_.:/-]?(\d{1,9})(?!\d)")
_NUMBER = re.compile(r"(?<=[_./:-])(\d{1,9})(?=[_./:-]|$)")


class ForeignKey(NamedTuple):
    """A key of RNG state.

    Attributes:
        key: The key.
        prefix: What it shares with others; ``*`` stands for the rank.
        rank: The rank in it, if it names one.
        rest: What it has besides.
    """

    key: str
    prefix: str
    rank: int | None
    rest: str


def find_keys(checkpoint: Checkpoint) -> list[ForeignKey]:
    """Return the keys of RNG state that no ``StatefulRNG`` stored, in their order."""
    keys = {k: stored for k, stored in checkpoint.keys.items() if not is_name(k.rpartition(".")[2])}
    beside = _sets_of_generators(keys)
    return [
        ForeignKey(key, *_split(key))
        for key in sorted(keys)
        if _is_rng_state(key, keys[key], key in beside)
    ]


def _is_rng_state(key: str, stored: Stored, beside_others: bool) -> bool:
    if stored.dtype is None:
        return beside_others or bool(_RNG.search(key))
    last = stored.size[-1] if stored.size else 0
    if stored.dtype == "uint8" and last == _TORCH_CPU_BYTES:
        return True
    named = beside_others or bool(_RNG.search(key) or _GENERATOR.search(key))
    if stored.dtype == "uint8":
        return named and last in _ACCELERATOR_BYTES
    return named and "int" in stored.dtype and len(stored.size) == 1 and last in _MT19937_WORDS


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _sets_of_generators(keys: Iterable[str]) -> set[str]:
    """Return keys such as ``state.python`` and ``state.numpy``, where two or more stand together.

    One alone, ``data.numpy``, may be anything.
    """
    sets: dict[str, set[str]] = {}
    for key in keys:
        prefix, _, name = key.rpartition(".")
        if name.lower() in _GENERATORS:
            sets.setdefault(prefix, set()).add(key)
    return {key for together in sets.values() if len(together) > 1 for key in together}


def _split(key: str) -> tuple[str, int | None, str]:
    """Return the prefix that a key shares with others, the rank in it, and what follows."""
    if key.startswith(MEGATRON_SHARD):
        return MEGATRON_SHARD, None, key.removeprefix(MEGATRON_SHARD)
    match = _RANK.search(key.lower()) or _numbered(key)
    if match:
        return f"{key[: match.start(1)]}*", int(match[1]), key[match.end() :].lstrip("._/:-")
    prefix, _, name = key.rpartition(".")
    while _GENERATORS & set(_words(prefix.rpartition(".")[2])):
        prefix, _, last = prefix.rpartition(".")
        name = f"{last}.{name}"
    return prefix, None, name


def _numbered(key: str) -> re.Match[str] | None:
    """Return the number that stands for a rank in ``rng/3`` or ``rng_states.3.python``."""
    for match in _NUMBER.finditer(key):
        before, separator = key[: match.start() - 1], key[match.start() - 1]
        last = before.rpartition(".")[2]
        # DCP takes lists apart: ".0" after a generator's name is a device or one of its words.
        if _RNG.search(before) and not (separator == "." and _GENERATORS & set(_words(last))):
            return match
    return None
