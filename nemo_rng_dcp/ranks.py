"""Which rank this process is, and what the ranks of a job say of one another's streams.

| | rank | world size | a collective |
|---|---|---|---|
| no process group | torchrun's ``RANK``, else 0 | 1 | asks nobody |
| a process group | the group's | the group's | gathers one object |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from nemo_rng_dcp.errors import RNGStateError


def global_rank() -> int:
    """Return this process's global rank; does not communicate.

    The default process group decides. Before it exists, torchrun's ``RANK`` variable does, and
    without either the process is rank 0.

    Raises:
        ValueError: ``RANK`` is set but is no rank.
    """
    if dist.is_initialized():
        return dist.get_rank()
    value = os.environ.get("RANK", "0")
    if not value.isdecimal():
        raise ValueError(f"the environment variable RANK is {value!r}, expected an integer >= 0")
    return int(value)


def world_size() -> int:
    """Return the default process group's size, 1 without one; does not communicate."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Peer(NamedTuple):
    """What a rank says of the streams of one of its rows.

    Attributes:
        rank: Its global rank.
        grid: The key of the table that its row is in. Ranks of another grid have other rows.
        row: Its row.
        fingerprints: By generator.
        shared: The generators that are alike on all ranks of its grid; others are so in a row.
    """

    rank: int
    grid: str
    row: int
    fingerprints: Mapping[str, str]
    shared: Collection[str]


_playing: int | None = None


def seed_rank() -> int:
    """Return the rank that ``ranked=True`` adds to a seed: the logical one inside ``as_rank()``.

    Raises:
        ValueError: As for :func:`global_rank`.
    """
    return global_rank() if _playing is None else _playing


def note_playing(rank: int | None) -> None:
    """Note which logical rank has the global generators; ``None``: outside of ``as_rank()``."""
    global _playing
    _playing = rank


def launched_processes() -> int:
    """Return how many processes torchrun started (``WORLD_SIZE``), 1 if it did not."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value and value.isdecimal() else 1


def gather_peers(
    own: Callable[[], list[Peer]], process_group: dist.ProcessGroup | None
) -> list[Peer]:
    """Return what all ranks say, by rank; every rank of the group must call it.

    Args:
        own: Returns what this rank says of each of its rows. If it raises, all ranks are told.
        process_group: The ranks; ``None``: those of the default process group.

    Raises:
        RNGStateError: On every rank: one of them cannot say it, or ranks of one grid have other
            generators. On those that called it: others did not, within the group's time-out.
        ValueError: This rank is not in ``process_group``.
    """
    if not dist.is_initialized():
        return own()
    if dist.get_rank(process_group) < 0:
        raise ValueError(f"rank {global_rank()} is not in the process_group that was given")
    answer: list[Peer] | str
    cause = None
    try:
        answer = own()
    except Exception as error:
        answer, cause = f"rank {global_rank()} cannot tell its streams: {error}", error
    answers = _all_gather(answer, process_group)
    problems = [text for text in answers if isinstance(text, str)]
    if not problems:
        peers = [peer for of_rank in answers for peer in of_rank]
        problems = list(dict.fromkeys(_unlike(peers)))
    if problems:
        raise RNGStateError("; ".join(problems)) from cause
    return peers


def fingerprints_by_row(peers: Iterable[Peer], grid: str) -> list[dict[str, str]]:
    """Return the fingerprints of the streams of a grid's rows; the lowest rank of a row speaks."""
    rows: dict[int, dict[str, str]] = {}
    for peer in peers:
        if peer.grid == grid:
            rows.setdefault(peer.row, dict(peer.fingerprints))
    return [rows[number] for number in sorted(rows)]


def drifted(peers: Collection[Peer]) -> list[str]:
    """Return a text for each generator and row in which ranks should be alike and are not."""
    several = len({peer.grid for peer in peers}) > 1
    plays_several = len({peer.rank for peer in peers}) < len(peers)
    messages = []
    for name in dict.fromkeys(name for peer in peers for name in peer.fingerprints):
        sharing: dict[tuple[str, int | None], list[Peer]] = {}
        for peer in peers:
            if name in peer.fingerprints:
                row = None if name in peer.shared else peer.row
                sharing.setdefault((peer.grid, row), []).append(peer)
        for (_, row), (first, *others) in sharing.items():
            other = [p for p in others if p.fingerprints[name] != first.fingerprints[name]]
            if other:
                # Several logical ranks of a process are named by their own numbers.
                listed = _rows_listed if plays_several and row is None else _listed
                text = f"ranks {listed([first, *others])} share it"
                if row is not None:
                    text = text.replace(" it", f" row {row}")
                elif not several:
                    text = "all ranks share it"
                differ = f"rank {listed(other)} differs from rank {listed([first])}"
                messages.append(f"{name}: {text}, but {differ}")
    return messages


def _all_gather(answer: object, process_group: dist.ProcessGroup | None) -> list[Any]:
    answers: list[Any] = [None] * dist.get_world_size(process_group)
    try:
        dist.all_gather_object(answers, answer, group=process_group)
    except RuntimeError as error:
        ranks = ", ".join(map(str, dist.get_process_group_ranks(process_group)))
        raise RNGStateError(
            f"rank {global_rank()}: not all of ranks {ranks} answered, and every rank of the "
            "process group must call this. Call it on all of them, or give process_group= the "
            f"ranks that do ({error})"
        ) from error
    return answers


def _unlike(peers: Iterable[Peer]) -> Iterator[str]:
    """Yield which generators only one of a rank and the first rank of its grid has."""
    first: dict[str, Peer] = {}
    for peer in peers:
        known = first.setdefault(peer.grid, peer)
        for name in sorted(peer.fingerprints.keys() ^ known.fingerprints.keys()):
            has, lacks = (known, peer) if name in known.fingerprints else (peer, known)
            yield (
                f"{name}: rank {has.rank} has this generator and rank {lacks.rank} has not: "
                "register the same names on every rank"
            )


def _listed(peers: Iterable[Peer]) -> str:
    return ", ".join(str(peer.rank) for peer in peers)


def _rows_listed(peers: Iterable[Peer]) -> str:
    return ", ".join(dict.fromkeys(str(peer.row) for peer in peers))
