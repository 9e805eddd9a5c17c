"""RNG state that other code stored in a checkpoint: told by its keys, never unpickled."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from nemo_rng_dcp.tools.metadata import CheckpointMetadata, Chunk, Stored

_GENERATORS = {"python", "random", "numpy", "np", "torch", "cpu", "cuda", "xpu", "mps"}
_RANK = re.compile(r"rank[_.:/-]?(\d+)")
_NUMBER = re.compile(r"(?<=[_./:-])(\d+)(?=[_./:-]|$)")
_WRITER = re.compile(r"__(\d+)_\d+")


@dataclass
class ForeignState:
    """RNG state under one path.

    Attributes:
        path: The keys' common path; ``*`` stands for the rank in rank-named keys.
        ranks: The ranks that the keys name; none where the keys are the same on every rank.
        contents: By key (without the path), what is stored.
        writers: By key, the rank that DCP took the value from, where the file's name says it.
    """

    path: str
    ranks: set[int] = field(default_factory=set)
    contents: dict[str, Stored] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)

    @property
    def pickled(self) -> bool:
        """Whether some of it is bytes, which only a pickle that runs can read."""
        return any(stored.dtype is None for stored in self.contents.values())


def find_foreign(metadata: CheckpointMetadata, own: Collection[str]) -> list[ForeignState]:
    """Return the RNG state that no ``StatefulRNG`` stored, by the names of its keys.

    Args:
        metadata: The checkpoint's.
        own: Paths of the entries that a ``StatefulRNG`` stored.
    """
    keys = [
        key
        for key in metadata.keys
        if "" not in own and not any(key.startswith(f"{path}.") for path in own)
    ]
    named = [key for key in keys if _is_rng(key)] + _sets_of_generators(keys)
    chunks = metadata.chunks(set(named))
    found: dict[tuple[str, bool], ForeignState] = {}
    for key in dict.fromkeys(named):
        path, rank, rest = _split(key)
        state = found.setdefault((path, rank is not None), ForeignState(path))
        state.contents[rest] = metadata.keys[key]
        if rank is not None:
            state.ranks.add(rank)
            continue
        writer = _writer(chunks[key])
        if writer is not None:
            state.writers[rest] = writer
    return list(found.values())


def ranks_that_wrote(files: Iterable[str]) -> set[int]:
    """Return the ranks that wrote a checkpoint's files, by the names DCP gives them."""
    return {int(match[1]) for file in files if (match := _WRITER.match(file))}


def _writer(chunks: list[Chunk]) -> int | None:
    return min(ranks_that_wrote(chunk.file for chunk in chunks), default=None)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _is_rng(key: str) -> bool:
    words = _words(key)
    return bool({"rng", "rngs"} & set(words)) or any(
        first in ("random", "generator", "generators") and then in ("state", "states")
        for first, then in pairwise(words)
    )


def _sets_of_generators(keys: list[str]) -> list[str]:
    """Return keys such as ``state.python`` and ``state.numpy``, where two or more stand together.

    One alone, ``data.numpy``, may be anything.
    """
    sets: dict[str, set[str]] = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        if name.lower() in _GENERATORS:
            sets.setdefault(path, set()).add(name)
    return [
        f"{path}.{name}" if path else name
        for path, names in sets.items()
        if len(names) > 1
        for name in sorted(names)
    ]


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
