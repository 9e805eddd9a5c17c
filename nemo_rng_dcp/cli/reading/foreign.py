"""RNG state that other code stored: how its keys are told, and what it is worth to a resume.

Keys are told by name, dtype and shape together; nothing is unpickled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.index import Stored
from nemo_rng_dcp.cli.terminal import numbered
from nemo_rng_dcp.keys import is_name

MEGATRON_SHARD = "rng_state/shard_"
"""How Megatron's keys begin. The numbers in them are coordinates, and no ranks."""

_GENERATORS = {"python", "random", "numpy", "np", "torch", "cpu", "cuda", "xpu", "mps"}
_TORCH_CPU_BYTES, _ACCELERATOR_BYTES = 5056, (16, 816)
_MT19937_WORDS = (624, 625)
_RNG = re.compile(r"(?<![a-z])(rngs?|random[^a-z]+states?)(?![a-z])", re.IGNORECASE)
_RANK = re.compile(r"rank[_.:/-]?(\d{1,9})(?!\d)")
_NUMBER = re.compile(r"(?<=[_./:-])(\d{1,9})(?=[_./:-]|$)")
MEGATRON = (
    "Megatron's, one state for each pipeline and tensor rank, with its tracker's CUDA streams: "
    "`nemo-rng-dcp import` does not read it"
)


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


@dataclass
class ForeignState:
    """RNG state whose keys begin alike.

    Attributes:
        prefix: What the keys have in common, "" at the top level; ``*`` stands for the rank in
            rank-named keys.
        ranks: The ranks that the keys name; none where the keys are the same on every rank.
        contents: By key (without the prefix), what is stored.
        each_its_own: Whether each rank reads its own value, as after ``use_collectives=False``.
    """

    prefix: str
    ranks: set[int] = field(default_factory=set)
    contents: dict[str, Stored] = field(default_factory=dict)
    each_its_own: bool = False

    def verdict(self, writers: set[int]) -> tuple[list[str], bool]:
        """Return what the state is worth, and whether a resume gives ranks other streams.

        Args:
            writers: The ranks that wrote the checkpoint's files.
        """
        where, lost = self.prefix or "the top level", False
        if self.ranks:
            notes = [
                f"{where}: one key a rank, {len(self.ranks)} ranks. On another number of ranks a "
                "new rank finds no key of its own. `nemo-rng-dcp import` reads such keys."
            ]
            if missing := sorted(writers - self.ranks):
                lost, ranks = True, numbered("rank", missing)
                notes.append(f"{where}: {ranks} wrote to this checkpoint, but no RNG state.")
        elif self.prefix == MEGATRON_SHARD:
            notes = [f"found {self.prefix}{min(self.contents)}: {MEGATRON}."]
        elif self.each_its_own:
            text = "one state a rank, each in a .metadata of its own. New ranks find none."
            notes = [f"{where}: {text}"]
        elif lost := len(writers) > 1:
            notes = [
                f"{where}: one state for all ranks, though {len(writers)} or more wrote this "
                "checkpoint: DCP took equal keys for copies and kept one of each. The other ranks' "
                "streams are lost, and after a load all ranks draw the same numbers."
            ]
        else:
            text = "one rank's state. Loaded by several ranks, all draw the same numbers."
            notes = [f"{where}: {text}"]
        if any(stored.dtype is None for stored in self.contents.values()):
            notes.append(f"{where}: stored as pickles, which were not read.")
        return notes, lost


def find_foreign(checkpoint: Checkpoint) -> list[ForeignState]:
    """Return the RNG state that no ``StatefulRNG`` stored, in the order of its keys."""
    found: dict[tuple[str, bool], ForeignState] = {}
    own = checkpoint.each_rank_reads_its_own
    for key, prefix, rank, rest in find_keys(checkpoint):
        state = ForeignState(prefix, each_its_own=own)
        state = found.setdefault((prefix, rank is not None), state)
        state.contents[rest] = checkpoint.keys[key]
        if rank is not None:
            state.ranks.add(rank)
    return list(found.values())


def find_keys(checkpoint: Checkpoint) -> list[ForeignKey]:
    """Return the keys of RNG state that no ``StatefulRNG`` stored, in their order."""
    keys = {k: stored for k, stored in checkpoint.keys.items() if not is_name(k.rpartition(".")[2])}
    return [ForeignKey(key, *_split(key)) for key in sorted(keys) if _is_rng_state(key, keys[key])]


def _is_rng_state(key: str, stored: Stored) -> bool:
    last, named = stored.size[-1] if stored.size else 0, bool(_RNG.search(key))
    if stored.dtype is None:
        return named
    if stored.dtype == "uint8":
        return last == _TORCH_CPU_BYTES or (named and last in _ACCELERATOR_BYTES)
    return named and "int" in stored.dtype and len(stored.size) == 1 and last in _MT19937_WORDS


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


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
