"""RNG state that other code stored: told by name, dtype and shape together, never unpickled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from nemo_rng_dcp.cli.checkpoint.checkpoint import Checkpoint
from nemo_rng_dcp.cli.checkpoint.index import Stored
from nemo_rng_dcp.cli.terminal import short_spans
from nemo_rng_dcp.record import KEY

_GENERATORS = {"python", "random", "numpy", "np", "torch", "cpu", "cuda", "xpu", "mps"}
_TORCH_CPU_BYTES, _ACCELERATOR_BYTES = 5056, (16, 816)
_MT19937_WORDS = (624, 625)
_RANK = re.compile(r"rank[_.:/-]?(\d{1,9})(?!\d)")
_NUMBER = re.compile(r"(?<=[_./:-])(\d{1,9})(?=[_./:-]|$)")
_WRITER = re.compile(r"__(\d{1,9})_\d+\.|shard-(\d{1,9})-")


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


@dataclass
class ForeignState:
    """RNG state under one path.

    Attributes:
        path: The keys' common path, "" at the top level; ``*`` stands for the rank in rank-named
            keys.
        ranks: The ranks that the keys name; none where the keys are the same on every rank.
        contents: By key (without the path), what is stored.
        writers: By key, the rank that DCP took the value from, where the file's name says it.
        each_its_own: Whether each rank reads its own value, as after ``use_collectives=False``.
    """

    path: str
    ranks: set[int] = field(default_factory=set)
    contents: dict[str, Stored] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)
    each_its_own: bool = False

    def missing(self, writers: set[int]) -> set[int]:
        """Return the ranks that should have state of their own here, and have not."""
        return writers - self.ranks if self.ranks else set()

    def lost(self, writers: set[int]) -> bool:
        """Return whether a resume gives ranks other streams than they had."""
        if self.ranks or self.each_its_own:
            return bool(self.missing(writers))
        return len(writers) > 1

    def notes(self, writers: set[int]) -> Iterator[str]:
        """Say what the state is worth; ``writers`` wrote the checkpoint's files."""
        where = self.path or "the top level"
        if self.ranks:
            yield (
                f"{where}: one key a rank, {len(self.ranks)} ranks. On another number of ranks a "
                "new rank finds no key of its own. `nemo-rng-dcp import` reads such keys."
            )
            if missing := sorted(self.missing(writers)):
                ranks = f"rank{'s' * (len(missing) > 1)} {short_spans(missing)}"
                yield f"{where}: {ranks} wrote to this checkpoint, but no RNG state."
        elif self.each_its_own:
            yield (
                f"{where}: one state a rank, each in a .metadata of its own. On more ranks a new "
                "rank finds none."
            )
        elif len(writers) > 1:
            kept = [f"{name or where} is rank {rank}'s" for name, rank in self.writers.items()]
            yield (
                f"{where}: one state for all ranks, though {len(writers)} or more wrote this "
                "checkpoint: DCP took equal keys for copies and kept one of each "
                f"({', '.join(kept[:6])}). The other ranks' streams are lost, and after a load all "
                "ranks draw the same numbers."
            )
        else:
            yield (
                f"{where}: one state, and one rank wrote the checkpoint. Loaded by several ranks, "
                "all would draw the same numbers."
            )
        if any(stored.dtype is None for stored in self.contents.values()):
            yield f"{where}: stored as pickles, which were not read."


def find_foreign(checkpoint: Checkpoint) -> list[ForeignState]:
    """Return the RNG state that no ``StatefulRNG`` stored, in the order of its paths."""
    found: dict[tuple[str, bool], ForeignState] = {}
    for key, path, rank, rest in find_keys(checkpoint):
        its_own = checkpoint.each_rank_reads_its_own
        state = found.setdefault((path, rank is not None), ForeignState(path, each_its_own=its_own))
        state.contents[rest] = checkpoint.keys[key]
        if rank is not None:
            state.ranks.add(rank)
        elif its := ranks_that_wrote(chunk.file for chunk in checkpoint.chunks(key)):
            state.writers[rest] = min(its)
    return list(found.values())


def find_keys(checkpoint: Checkpoint) -> list[ForeignKey]:
    """Return the keys of RNG state that no ``StatefulRNG`` stored, in their order."""
    keys = {k: its for k, its in checkpoint.keys.items() if k.rpartition(".")[2] != KEY}
    beside = _sets_of_generators(keys)
    return [
        ForeignKey(key, *_split(key))
        for key in sorted(keys)
        if _is_state(key, keys[key], key in beside)
    ]


def ranks_that_wrote(files: Iterable[str]) -> set[int]:
    """Return the ranks that wrote a checkpoint's files, by the names DCP gives them."""
    matches = (match for file in files if (match := _WRITER.match(file)))
    return {int(match[1]) if match[1] else int(match[2]) - 1 for match in matches}


def _is_state(key: str, stored: Stored, beside_others: bool) -> bool:
    if stored.dtype is None:
        return beside_others or _is_rng(key)
    last = stored.size[-1] if stored.size else 0
    if stored.dtype == "uint8" and last == _TORCH_CPU_BYTES:
        return True
    named = beside_others or _is_rng(key) or _says_generator_state(key)
    if stored.dtype == "uint8":
        return named and last in _ACCELERATOR_BYTES
    return named and "int" in stored.dtype and len(stored.size) == 1 and last in _MT19937_WORDS


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _is_rng(key: str) -> bool:
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
        if _is_rng(before) and not (separator == "." and _GENERATORS & set(_words(last))):
            return match
    return None
