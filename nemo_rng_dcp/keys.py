"""The keys of records in a checkpoint; each grid of ranks has its own (see ``grids.py``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

KEY = "rng_streams"
"""The key under which records are stored, and by which they are found."""


def is_name(name: str, expected: str = KEY) -> bool:
    """Return whether the last part of a key is a record's, of whichever grid."""
    base, at, lowest = name.partition("@")
    return base == expected and (lowest.isdecimal() or not at)


def is_record(key: str, dtype: object, size: Sequence[int], name: str = KEY) -> bool:
    """Return whether a load takes what a checkpoint has under a key for records.

    Args:
        key: The key in the checkpoint.
        dtype: The tensor's data type; ``None``, for example, where no tensor is stored.
        size: The tensor's shape.
        name: The last part of their keys, without a grid.
    """
    return is_name(key.rpartition(".")[2], name) and dtype == torch.int64 and len(size) == 1


def base_of(key: str) -> str:
    """Return the last part of a key, without the grid."""
    return key.rpartition(".")[2].partition("@")[0]


def path_of(key: str) -> str:
    """Return where the ``StatefulRNG`` of a record is, with its grid unless that has rank 0.

    ``app.rng`` for ``app.rng.rng_streams``, and ``app.rng@4`` for ``app.rng.rng_streams@4``.
    """
    path, _, name = key.rpartition(".")
    return path + name.removeprefix(KEY)


def own_key(key: str, saved: Collection[str]) -> str | None:
    """Return the key of the saved record to load for an entry; ``None``: there is none for it.

    Its own; else that of the only grid without rank 0 that was saved there, which may lie on other
    ranks now. The record of rank 0's grid is no other grid's.

    Args:
        key: The entry's key.
        saved: All keys that there are.
    """
    if key in saved:
        return key
    moved = [other for other in beside(key, saved) if other != renamed(key, base_of(key))]
    return moved[0] if len(moved) == 1 else None


def renamed(key: str, name: str) -> str:
    """Return a key with another last part."""
    path, dot, _ = key.rpartition(".")
    return path + dot + name


def beside(key: str, saved: Collection[str]) -> list[str]:
    """Return the keys, of all that there are, of the records of all grids where an entry is."""
    places = ((other, other.rpartition(".")) for other in saved)
    path, base = key.rpartition(".")[0], base_of(key)
    return [other for other, (place, _, name) in places if place == path and is_name(name, base)]
