"""The checkpoint that a path means: the folder itself, or the one below it that has records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.dcp_metadata import Metadata, metadata_files
from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.reading.safetensors import Safetensors
from nemo_rng_dcp.cli.reading.table import Table
from nemo_rng_dcp.errors import RNGStateError

_Found = TypeVar("_Found")


def open_checkpoint(where: str) -> Checkpoint:
    """Return the checkpoint at a path or URL, or one folder below it.

    Frameworks keep records beside or below other things: the one folder that has records is taken.

    Raises:
        RNGStateError: There is none, there are several to choose from, or it is damaged.
        OSError: It cannot be read.
    """
    folder = Folder(where)
    own = checkpoint_in(folder)
    if own is not None and own.records:
        return own
    below, error = checkpoints_in(folder.below())
    chosen = [checkpoint for checkpoint in below if checkpoint.records]
    if not chosen and error is not None:
        raise error
    if chosen := chosen or ([own] if own else below):
        return only_one(where, chosen)
    raise RNGStateError(
        f"{where}: no .metadata in it: it is no DCP checkpoint, or its save did not finish"
    )


def only_one(where: str, found: Sequence[_Found]) -> _Found:
    """Return what was found at a path.

    Raises:
        RNGStateError: There are several to choose from.
    """
    if len(found) > 1:
        names = ", ".join(map(str, found[:6]))
        raise RNGStateError(f"{where}: it holds {len(found)} checkpoints, name one: {names}")
    return found[0]


def open_tables(where: str) -> list[Table]:
    """Return the tables of the checkpoint that :func:`open_checkpoint` finds.

    Raises:
        RNGStateError: It has none, or there is no such checkpoint.
        OSError: It cannot be read.
    """
    checkpoint = open_checkpoint(where)
    if not checkpoint.records:
        raise RNGStateError(f"{checkpoint.where}: no StatefulRNG's record in it; see inspect")
    return [Table(checkpoint, key) for key in checkpoint.records]


def checkpoint_in(folder: Folder) -> Checkpoint | None:
    """Return the checkpoint in a folder, if it is one, by the index that ``dcp.load`` uses.

    Raises:
        RNGStateError: It is damaged.
        OSError: It cannot be read.
    """
    if names := metadata_files(folder):
        return Checkpoint(folder, {rank: Metadata(folder, name) for rank, name in names.items()})
    index = Safetensors(folder)
    return Checkpoint(folder, {None: index}) if index.files else None


def checkpoints_in(folders: Iterable[Folder]) -> tuple[list[Checkpoint], RNGStateError | None]:
    """Return the checkpoints in folders, and why the first that is damaged cannot be read.

    It may not be the one asked for, so the caller decides whether it matters. What cannot be opened
    is somebody else's.
    """
    found, first_error = [], None
    for folder in folders:
        try:
            if checkpoint := checkpoint_in(folder):
                found.append(checkpoint)
        except RNGStateError as error:
            first_error = first_error or error
        except OSError:
            continue
    return found, first_error
